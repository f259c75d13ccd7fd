"""Cards by name and by amount."""

import pytest

from cogcommon.errors import SettingError
from cogcommon.model.cards import CARDS, card_like, card_named, sizes_note

GIB = 2**30


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        line.split(" = ")
        for line in """
4090 = RTX 4090
rtx-3090 = RTX 3090
RTX 3090 Ti = RTX 3090 Ti
geforce rtx 2080 = RTX 2080
l4 = L4
T4 = T4
a10 = A10
a100 = A100
a100-40gb = A100
a100-80 = A100 80GB
A100 80G = A100 80GB
h100 = H100
h200 = H200
v100 = V100
v100-32 = V100 32GB
4060ti = RTX 4060 Ti
4060ti-16 = RTX 4060 Ti 16GB
a6000 = RTX A6000
6000 ada = RTX 6000 Ada
""".strip().splitlines()
    ],
)
def test_a_card_is_known_by_the_names_that_people_type(typed, name):
    assert card_named(typed).name == name


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        line.split(", ")
        for line in """
NVIDIA GeForce RTX 4090, 23.6, RTX 4090
NVIDIA GeForce RTX 3080, 11.8, RTX 3080 12GB
NVIDIA GeForce RTX 4060 Ti, 15.6, RTX 4060 Ti 16GB
NVIDIA H100 80GB HBM3, 79.2, H100
NVIDIA H100 PCIe, 79.2, H100 PCIe
NVIDIA H200, 139.8, H200
NVIDIA A100-SXM4-80GB, 79.2, A100 80GB
NVIDIA A100-PCIE-40GB, 39.4, A100
Tesla T4, 14.6, T4
Tesla V100-SXM2-16GB, 15.8, V100
NVIDIA L40S, 44.4, L40S
NVIDIA RTX 6000 Ada Generation, 47.5, RTX 6000 Ada
NVIDIA RTX PRO 6000 Blackwell Server Edition, 94.9, RTX PRO 6000
""".strip().splitlines()
    ],
)
def test_a_card_is_known_by_the_name_that_its_driver_gives(driver, gib, name):
    assert card_like(driver, int(float(gib) * GIB)).name == name


@pytest.mark.parametrize(
    ("typed", "note"),
    [
        ("A100", "A100 is read as the 40 GB card; A100-80GB is another"),
        ("4060 ti", "4060 ti is read as the 8 GB card; RTX-4060-Ti-16GB is another"),
        ("a100-80", None),
        ("H100", None),
        ("24GB", None),
    ],
)
def test_a_name_that_fits_cards_of_several_sizes_is_noted(typed, note):
    assert sizes_note(typed) == note


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "AMD Instinct MI300X", "RTX 4090 D", ""])
def test_a_card_that_is_like_one_we_know_is_not_it(name):
    assert card_like(name, 16 * GIB) is None


def test_an_amount_stands_for_the_least_that_a_card_sold_with_it_gives():
    assert card_named("24GB").bytes == card_named("24 gb").bytes == card_named("24").bytes == card_named("L4").bytes
    assert card_named("24GB").rate is None and card_named("16G").bytes == card_named("T4").bytes
    assert card_named("22.5GiB").bytes == int(22.5 * GIB)
    assert card_named("20").sold == 20 and card_named("80").bytes < 80 * GIB


@pytest.mark.parametrize(
    ("typed", "says", "fix"),
    [
        ("4091", "no card is sold with 4091 GB", "--gpu RTX-4090; "),
        ("4090GB", "no card is sold with 4090 GB", "--gpu RTX-4090; "),
        ("7777", "no card is sold with 7777 GB", "--gpu 288GB"),
        ("42GB", "no card is sold with 42 GB", "--gpu 40GB or --gpu 48GB"),
        ("0GB", "no card is sold with 0 GB", "--gpu 6GB"),
        ("2400GiB", "no card has 2400 GiB free", "22GiB"),
        ("0GiB", "no card has 0 GiB free", "22GiB"),
        ("much", "no card that we know is called 'much'", "as 24GB"),
        ("409o", "no card that we know is called '409o'", "did you mean RTX 4090? --gpu with its memory, as 24GB"),
        ("-24GB", "no card that we know", "as 24GB"),
        ("nanGB", "no card that we know", "as 24GB"),
    ],
)
def test_an_amount_that_no_card_has_is_refused(typed, says, fix):
    with pytest.raises(SettingError) as caught:
        card_named(typed)
    assert says in caught.value.what and fix in caught.value.fix and caught.value.where == "--gpu"


def test_the_table_is_of_cards_that_can_be():
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 0.9 * card.sold < card.usable < card.sold and 20 < card.rate < 3000 and card.link >= 12, card
        assert card_named(card.name) == card  # no name is hidden by another
