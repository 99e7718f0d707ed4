"""The first picture: models that are trained alike, and a first point that is there soon."""

from holdall import recipes
from holdall.recipes import quick
from holdall.sweeps import in_order
from holdall.sweeps.additions import frame


def test_all_models_differ_in_the_mixer_alone():
    (sweep,) = recipes.sweeps("quick")
    assert len(sweep.points) == 12
    trains = [point.train for point in sweep.points]
    # "model" and "train" are what a frame holds beside the layers, of which only the last may differ
    assert len({frame(train)[1:] for train in trains}) == 1
    assert len({train.model.layers[:-1] for train in trains}) == 1
    assert {job.steps for job in sweep.jobs(together=True)} == {quick.STEPS}
    assert len({point.train.model.layers[-1] for point in sweep.points}) == 12


def test_the_dozen_is_of_many_kinds_and_none_that_cannot_show_what_it_holds():
    names = [mixer.name for _, _, mixer in quick.architectures(quick.WIDTH)]
    assert set(names) > {"attention", "sliding-window", "taylor", "delta-net", "mamba-2"}
    assert "mamba" not in names


def test_the_first_point_takes_a_small_share_of_the_sweep():
    (sweep,) = recipes.sweeps("quick")
    jobs = sweep.jobs(together=False)
    first, *others = in_order(jobs)
    assert all(jobs[first].operations <= jobs[other].operations for other in others)
    assert jobs[first].operations < sum(job.operations for job in jobs) / 30
