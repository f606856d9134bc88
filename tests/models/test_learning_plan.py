"""Plans of what is to be learned: those of the package can be read, and mistakes in one are told by name."""

from pathlib import Path

import pytest
from headrace.models.exceptions import DataError
from headrace.models.learning.plan import TrainPlan

PLAN = (Path(__file__).parent / "slim_plan.toml").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("latent = 12", "latent = 0"), "encoder.latent"),
        (("batch = 8", "batsh = 8"), "batsh"),
        (("50 = [4, 8, 4, 8, 8,", "50 = [4, 8, 4, 8,"), "7 channels"),
        (("50 = [4, 8,", "50 = [4, 17,"), "fewer channels"),
        (("50 = [4, 8,", "50 = [3, 8,"), "stride 3"),
        (('towards = "features"', 'towards = "labels"'), "stages.0.towards"),
        (("latent = 12", "latent = 12\nkept = ['75']"), "no width '75'"),
        (("tail_rank = 2", "tail_rank = 0"), "tail_rank"),
        (("views = 64", "views = "), "not TOML"),
        (("views = 64", "views = 64\ndistortions = { 75 = [0.1] }"), "'75'"),
        (("views = 64", "views = 64\ndistortions = { 50 = [0.2, 0.1] }"), "have to rise"),
        (("views = 64", "views = 64\ntail_kept = 0"), "tail_kept"),
        (("batch = 8", "batch = 65"), "65 views a step are drawn from the 64"),
    ],
)
def test_plans_with_mistakes_are_refused(tmp_path, change, says):
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.replace(*change))
    with pytest.raises(DataError, match=says):
        TrainPlan.load(file)


def test_the_plans_that_come_along_can_be_read():
    folder = Path(__file__).parents[2] / "models" / "plans"
    plans = [TrainPlan.load(file) for file in sorted(folder.glob("*.toml"))]
    assert plans and all(plan.bundle.is_dir() for plan in plans)
