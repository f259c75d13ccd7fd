import pytest

from cogcommon.words import bytes_of, counted, did_you_mean, in_bytes, in_words


def test_counts_agree_with_their_noun():
    assert [counted(n, "clip") for n in (0, 1, 1200)] == ["0 clips", "1 clip", "1,200 clips"]
    assert counted(2, "process", "processes") == "2 processes"


def test_what_was_meant_stands_before_the_advice():
    assert did_you_mean(["a", "b"], "give a folder") == "did you mean a or b? give a folder"
    assert (did_you_mean([], "give a folder"), did_you_mean(["a"])) == ("give a folder", "did you mean a?")


@pytest.mark.parametrize(("seconds", "said"), [(4, "4.0 s"), (61, "61 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_times(seconds, said):
    assert in_words(seconds) == said


@pytest.mark.parametrize(("size", "said"), [(12, "12 B"), (1e3, "1 kB"), (6.34e6, "6.34 MB"), (23.4e12, "23.4 TB")])
def test_sizes(size, said):
    assert in_bytes(size) == said


def test_a_size_is_read_as_people_type_it():
    sizes = {"500MB": 500_000_000, "2 g": 2 * 10**9, "1.5kB": 1500, "7": 7, " 200GB ": 200 * 10**9, "1T": 10**12}
    assert {text: bytes_of(text) for text in sizes} == sizes
    assert [bytes_of(text) for text in ("", "GB", "0", "-1GB", "1EB", "1²", "٣GB", "1e9", "9" * 400, "nan")] == [
        None
    ] * 10
