"""HDR among SDR clips, from the lists to the report: tone-mapped, or rejected, the others as if it were not there."""

from __future__ import annotations

from corpus import BT2020, HLG, cards, write

from cogcommon.model.families import Resolution
from cogcommon.shards.records import read_record
from cogprep.commands.validate import validate
from cogprep.plan.folder import scan
from cogprep.settings.encode import ValidateSettings
from cogprep.show.source_view import SourceView, view_source
from cogprep.video.cut import Cut


def test_hdr_is_tone_mapped_or_rejected_and_sdr_stays_as_it_was(root, tmp_path, run_encode, lay_lists):
    write(root / "hlg.mp4", cards(), pix_fmt="yuv420p10le", codec="libx265", matrix=BT2020, tag=BT2020, trc=HLG)
    names = ["0.mp4", "1.mp4", "hlg.mp4"]
    lay_lists(root, ["a wave", "another wave", "a card"], names[:2])
    (root / "prompts.txt").write_text("a wave\nanother wave\n")
    assert run_encode().encoded == 2
    sdr = set(scan(tmp_path / "out").samples["train"])

    lay_lists(root, ["a wave", "another wave", "a card"], names)
    advice = validate(ValidateSettings(data_root=root, model="tiny", resolution=["9x64x96"], workers=1)).advice
    assert [line for one in advice if one.kind == "HDR" for line in one.lines] == [
        (3, "bt2020 limited, HLG up to 1000 cd/m2 tone-mapped to SDR")
    ]
    report = run_encode()
    assert (report.encoded, report.reused, report.tone_mapped) == (1, 2, 1)
    both = set(scan(tmp_path / "out").samples["train"])
    (row,) = [row for path in (tmp_path / "out").glob("*.parquet") for row in read_record(path).rows
              if row.source == "hlg.mp4"]  # fmt: skip
    assert sdr < both and both - sdr == {row.key}
    shown = view_source(root / row.source, row.source_sha256, Resolution.parse(row.bucket), Cut(), 8, row.key, 1)
    assert isinstance(shown, SourceView)

    report = run_encode(hdr="reject")
    assert (report.encoded, report.reused, report.rejected, report.kept, report.dropped) == (0, 2, 1, 0, 1)
    assert "--hdr reject" in report.rejections[0].reason
    assert set(scan(tmp_path / "out").samples["train"]) == sdr

    report = run_encode()
    assert (report.encoded, report.reused, report.rejected) == (1, 2, 0)
    assert set(scan(tmp_path / "out").samples["train"]) == both
