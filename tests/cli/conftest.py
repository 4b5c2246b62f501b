"""What a run will take is foreseen once for each model and recipe: trying small layers costs more than these runs."""

import pytest

from sparlow.cli import compressing


@pytest.fixture(scope="module", autouse=True)
def foreseen_once():
    known, plan = {}, compressing.plan

    def planned(model, recipe, *, out, **options):
        key = str(model), recipe.to_toml(), repr(sorted(options.items()))
        if key not in known:
            known[key] = plan(model, recipe, out=out, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "plan", planned)
        yield
