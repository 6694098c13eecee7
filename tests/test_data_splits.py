"The split of good images, as properties on random sets"
import numpy as np
import pytest

from anomnb.core.errors import AnomnbError
from anomnb.data.read import Item
from anomnb.data.splits import split_good, take_groups


def make(n, lots, seed):
    g = np.random.default_rng(seed)
    return [Item(f"part-{i}.png", group="" if lots is None else f"lot {g.integers(lots)}") for i in range(n)]


@pytest.mark.parametrize("n", [1, 5, 9, 10, 11, 23, 24, 25, 100, 333])
@pytest.mark.parametrize("val", [0.0, 0.1])
def test_counts_of_images_without_groups(n, val):
    s = split_good(make(n, None, 0), val=val)
    cal = max(5, round(0.2 * n)) if n >= 10 else 0
    assert s.counts() == dict(cal=cal, val=max(1, round(val * n)) if val and n >= 10 else 0, fit=n - cal - len(s.val))


@pytest.mark.parametrize("seed", range(8))
def test_groups_stay_whole_and_nothing_is_lost(seed):
    items = make(60, 3 + 4 * seed, seed)
    s = split_good(items, val=0.1, seed=seed)
    assert sorted(o.source for part in s for o in part) == sorted(o.source for o in items)
    lots = [{o.group for o in part} for part in s]
    assert not (lots[0] & lots[1] or lots[0] & lots[2] or lots[1] & lots[2])
    assert len(s.fit) >= 15 and (not s.cal or 5 <= len(s.cal) <= 30)


def test_depends_on_seed_and_names_alone():
    items = make(50, 20, 1)
    shuffled = [items[i] for i in np.random.default_rng(2).permutation(50)]
    names = lambda s: [[o.source for o in part] for part in s]  # noqa: E731
    assert names(split_good(items, val=0.1)) == names(split_good(shuffled, val=0.1))
    assert names(split_good(items)) != names(split_good(items, seed=1))
    assert split_good(items).cal == split_good(items, val=0.1).cal


def test_one_name_for_a_group_and_an_image_does_not_join_them():
    items = [Item("a.png"), Item("b.png", group="a.png"), Item("c.png", group="a.png"), Item("d.png")]
    taken, left = take_groups(items, 2, 0, "x")
    assert len({o.source for o in taken} & {"b.png", "c.png"}) in (0, 2)
    assert len(taken) + len(left) == 4


@pytest.mark.parametrize("args", [dict(cal=20), dict(cal=-0.1), dict(val=0.6), dict(val="0.1"), dict(cal=True), dict(cal=float("nan"))])
def test_bad_shares(args):
    with pytest.raises(AnomnbError, match="from 0 to 0.5"):
        split_good(make(20, None, 0), **args)
