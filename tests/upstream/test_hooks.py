"""Hooks: everything is checked before anything is touched, and everything can be undone."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from megatron_patch.errors import UpstreamChanged
from megatron_patch.upstream.hooks import Hook, after, around, before, check_version, install

# --- on stubs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """Two modules that look like Megatron's: `first` defines `build` and `step`, `second` defines `log`."""
    first, second = ModuleType("megatron.stub_first"), ModuleType("megatron.stub_second")

    def build(config: Any, model: Any, extra: int = 7) -> Any:
        return ("built", config, model, extra)

    def step(iteration: int) -> Any:
        return ("stepped", iteration)

    def log(*args: Any) -> Any:
        return ("logged", *args)

    for module, functions in ((first, (build, step)), (second, (log,))):
        for function in functions:
            function.__module__ = module.__name__
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return first, second


def loud(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that can be told from its original."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ("wrapped", original(*args, **kwargs))

    return wrapper


def hook(target: str, *parameters: str, **more: Any) -> Hook:
    return Hook(f"megatron.stub_{target}", parameters, loud, "test the hooks", **more)


ALL = (hook("first:build", "config", "model"), hook("first:step", "iteration"), hook("second:log"))


def everything(stubs: tuple[ModuleType, ModuleType]) -> dict[str, Any]:
    """What the stubs hold now."""
    return {f"{m.__name__}:{name}": value for m in stubs for name, value in vars(m).items() if name[0] != "_"}


def test_all_are_assigned_and_all_are_undone(stubs: tuple[ModuleType, ModuleType]) -> None:
    before = everything(stubs)
    installation = install(ALL)
    first, second = stubs
    assert first.build("c", "m") == ("wrapped", ("built", "c", "m", 7))
    assert first.step(3) == ("wrapped", ("stepped", 3))
    assert second.log() == ("wrapped", ("logged",))
    installation.remove()
    assert {name: value for name, value in everything(stubs).items() if value is not before[name]} == {}
    assert everything(stubs).keys() == before.keys()


def test_context_manager_undoes_after_an_error(stubs: tuple[ModuleType, ModuleType]) -> None:
    before = everything(stubs)

    def fail() -> None:
        with install(ALL):
            assert everything(stubs) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(stubs) == before


def test_removing_twice_is_harmless(stubs: tuple[ModuleType, ModuleType]) -> None:
    installation = install(ALL)
    installation.remove()
    stubs[0].build = loud(stubs[0].build)  # somebody else's business by now
    installation.remove()


def missing_symbol(stubs: tuple[ModuleType, ModuleType]) -> str:
    del stubs[1].log
    return "megatron.stub_second:log does not exist in this Megatron (needed to test the hooks)"


def missing_module(stubs: tuple[ModuleType, ModuleType]) -> str:
    del sys.modules[stubs[1].__name__]
    return "megatron.stub_second:log does not exist in this Megatron (needed to test the hooks)"


def missing_parameter(stubs: tuple[ModuleType, ModuleType]) -> str:
    def step(current: int) -> None: ...

    step.__module__ = stubs[0].__name__
    stubs[0].step = step
    return "megatron.stub_first:step has no parameter iteration any more (needed to test the hooks)"


def bound_elsewhere(stubs: tuple[ModuleType, ModuleType]) -> str:
    stubs[1].step = stubs[0].step
    return "megatron.stub_first:step is also bound in megatron.stub_second, where our hook would not reach"


def bound_elsewhere_under_another_name(stubs: tuple[ModuleType, ModuleType]) -> str:
    stubs[1].megatron_step = stubs[0].step  # type: ignore[attr-defined]
    return "megatron.stub_first:step is also bound in megatron.stub_second, where our hook would not reach"


def already_installed(stubs: tuple[ModuleType, ModuleType]) -> str:
    install((hook("second:log"),))
    return "megatron.stub_second:log is hooked already: install megatron_patch once per process"


REFUSALS = [
    missing_symbol,
    missing_module,
    missing_parameter,
    bound_elsewhere,
    bound_elsewhere_under_another_name,
    already_installed,
]


@pytest.mark.parametrize("prepare", REFUSALS)
def test_refusal_says_what_is_wrong_and_touches_nothing(
    stubs: tuple[ModuleType, ModuleType], prepare: Callable[[Any], str]
) -> None:
    message = prepare(stubs)
    before = everything(stubs)
    with pytest.raises(UpstreamChanged) as caught:
        install(ALL)
    assert str(caught.value) == message
    assert everything(stubs) == before
    for value in everything(stubs).values():
        assert getattr(value, "_megatron_patch", None) in (None, "megatron.stub_second:log")


def test_no_wrapper_is_made_before_all_are_checked(stubs: tuple[ModuleType, ModuleType]) -> None:
    """A wrapper may have effects of its own, such as importing."""
    made = []

    def note(original: Any) -> Any:
        made.append(original)
        return loud(original)

    with pytest.raises(UpstreamChanged):
        install((Hook("megatron.stub_first:build", (), note, "look"), hook("second:absent")))
    assert made == []


def test_the_same_target_twice_in_one_list(stubs: tuple[ModuleType, ModuleType]) -> None:
    """The second would silently replace the first."""
    before = everything(stubs)
    with pytest.raises(UpstreamChanged, match="hooked twice by megatron_patch itself"):
        install((hook("second:log"), hook("second:log")))
    assert everything(stubs) == before


def test_names_that_the_users_code_has_imported(
    stubs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``from megatron... import step`` at the head of a script, or of a module beside it, gets the hook as well."""
    first, _ = stubs
    original, mine = first.step, ModuleType("mine")
    mine.take_step = original  # type: ignore[attr-defined]
    mine.kept = mine.changed = original  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    monkeypatch.setattr(sys.modules["__main__"], "step", original, raising=False)
    installation = install(ALL)
    assert mine.take_step(1) == sys.modules["__main__"].step(1) == ("wrapped", ("stepped", 1))
    mine.changed = 5
    installation.remove()
    assert mine.take_step is mine.kept is sys.modules["__main__"].step is original
    assert mine.changed == 5


def test_our_own_modules_keep_what_they_imported(
    stubs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrapper may build on the original by its name."""
    from megatron_patch.upstream import hooks

    monkeypatch.setattr(hooks, "step", stubs[0].step, raising=False)
    with install(ALL):
        assert hooks.step(1) == ("stepped", 1)  # type: ignore[attr-defined]


def test_bindings_that_are_allowed(stubs: tuple[ModuleType, ModuleType]) -> None:
    first, second = stubs
    second.step = first.step
    with install((hook("first:step", "iteration", also_bound_in=("megatron.stub_second",)),)):
        assert first.step(1) == ("wrapped", ("stepped", 1))
        assert second.step(1) == ("stepped", 1)
    # The module that defines a function keeps it, where the trainer imports it by name.
    with install((hook("second:step", "iteration"),)):
        assert second.step(1) == ("wrapped", ("stepped", 1))
        assert first.step(1) == ("stepped", 1)


def test_a_replacement_on_top_of_ours_is_not_undone(stubs: tuple[ModuleType, ModuleType]) -> None:
    """Neither theirs nor ours: undoing half would leave a chain with a hole."""
    installation = install(ALL)
    ours = everything(stubs)
    first, _ = stubs
    first.step = loud(first.step)
    on_top = first.step
    with pytest.raises(UpstreamChanged, match=r"^megatron\.stub_first:step was replaced again after megatron_patch"):
        installation.remove()
    assert everything(stubs) == {**ours, "megatron.stub_first:step": on_top}
    first.step = ours["megatron.stub_first:step"]  # as the message asks
    installation.remove()
    assert first.step(1) == ("stepped", 1)


def test_undone_in_reverse(stubs: tuple[ModuleType, ModuleType]) -> None:
    """Later installations go first: the earlier one refuses while it is covered."""
    outer = install((hook("first:step"),))
    covered = stubs[0].step
    del covered._megatron_patch  # as if another package, which knows nothing of ours, came between
    inner = install((hook("first:step"),))
    with pytest.raises(UpstreamChanged):
        outer.remove()
    inner.remove()
    assert stubs[0].step is covered
    outer.remove()
    assert stubs[0].step(1) == ("stepped", 1)


def _add(a: int, b: int = 2, *, c: int = 3) -> int:
    return a + b + c


@pytest.mark.parametrize(
    ("args", "kwargs", "seen"),
    [((1,), {}, (1, 2, 3)), ((), {"a": 1}, (1, 2, 3)), ((1, 5), {}, (1, 5, 3)), ((1,), {"c": 7}, (1, 2, 7))],
)
def test_handlers_get_what_they_name_however_it_is_given(
    args: tuple[int, ...], kwargs: dict[str, int], seen: tuple[int, int, int]
) -> None:
    told: list[tuple[int, ...]] = []
    assert before(lambda *values: told.append(values), "a", "b", "c")(_add)(*args, **kwargs) == sum(seen)
    assert after(lambda *values: told.append(values), "c", "a")(_add)(*args, **kwargs) == sum(seen)
    assert told == [seen, (sum(seen), seen[2], seen[0])]


def test_before_comes_first_and_after_last() -> None:
    order: list[str] = []

    def original() -> None:
        order.append("original")

    after(lambda result: order.append("after"))(before(lambda: order.append("before"))(original))()
    assert order == ["before", "original", "after"]


def test_around_decides_whether_and_with_what_the_original_is_called() -> None:
    assert around(lambda call, b: -call(b=b * 10), "b")(_add)(1, c=0) == -(1 + 20 + 0)
    assert around(lambda call: None)(_add)() is None
    assert around(lambda call: call())(_add).__name__ == "_add"


def test_a_handler_that_raises_keeps_the_original_from_being_called() -> None:
    called: list[int] = []

    def refuse(a: int) -> None:
        raise ValueError(a)

    with pytest.raises(ValueError, match="7"):
        before(refuse, "a")(lambda a: called.append(a))(7)
    assert not called


# --- versions --------------------------------------------------------------------------------------------------------


def fake_core(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    core = ModuleType("megatron.core")
    if version is not None:
        core.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)


@pytest.mark.parametrize("version", ["0.19", "0.19.0", "0.19.2", "0.19.2+local", "0.19.rc1"])
def test_tested_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_core(monkeypatch, version)
    assert check_version() == version


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "0.1", "0.190.0", "1.0.19", "", None])
def test_untested_versions(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    fake_core(monkeypatch, version)
    with pytest.raises(
        UpstreamChanged, match=r"^megatron-core .*is tested with 0\.19 only; .*--allow-untested-megatron"
    ):
        check_version()
    assert check_version(allow_untested=True) == ("without a version" if version is None else version)


def test_no_megatron_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "megatron" or n.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)  # how the import system is told that there is none
    with pytest.raises(UpstreamChanged, match="megatron-core is not installed in this Python: pip install"):
        check_version(allow_untested=True)
