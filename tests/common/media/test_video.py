import av
import numpy as np

from cogcommon.media.video import write_mp4


def test_the_same_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (17, 16, 24, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    files = set()
    for _ in range(20):
        write_mp4(tmp_path / "a.mp4", frames, 16)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_colours_and_rate_come_back(tmp_path):
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    frames[:, :, :48] = (200, 30, 40)
    frames[:, :, 48:] = (20, 90, 220)
    write_mp4(tmp_path / "a.mp4", frames, 29.97)
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert abs(float(stream.average_rate) - 29.97) < 0.001
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert abs(decoded.astype(int) - frames)[:, :, [20, 80]].max() <= 3
