"""What sweeps know of their recipe's seeds: reports advise --seeds only where the command has it."""

import json

from holdall import recipes
from holdall.recipes import quick
from holdall.sweeps.folder import claimed


def test_own_recipes_all_take_seeds_and_say_so(tmp_path):
    assert all("seeds" in recipes.takes(make) for make in recipes.SWEEPS.values())
    (sweep,) = recipes.sweeps("quick")
    assert sweep.takes_seeds
    with claimed(tmp_path, sweep, sweep.jobs(together=True), "holdall frontier quick", "cpu"):
        assert json.loads((tmp_path / "config.json").read_text())["takes_seeds"] is True


def test_a_function_without_seeds_says_so_too():
    (sweep,) = recipes.call(lambda: quick.sweeps(1), "mine")
    assert not sweep.takes_seeds
    (sweep,) = recipes.call(lambda seeds: quick.sweeps(seeds), "mine")
    assert sweep.takes_seeds
