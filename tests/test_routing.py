"""Where turns go: to their context, to a known beginning, to whoever has the least to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcept.conversations import digests_of, extend_digest
from jaxcept_serve.routing import Reason, Router

SYSTEM = {"role": "system", "content": "You are helpful."}


def said(*texts: str) -> list[dict[str, str]]:
    return [SYSTEM, *({"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts))]


def turn(router: Router, texts: list[str], answer: str = "yes", name: str | None = None) -> tuple[str, Reason]:
    """One turn from beginning to end: (engine, reason)."""
    digests = digests_of("", {}, said(*texts))
    choice = router.begin(digests, name)
    assert choice is not None
    router.end(choice.engine, extend_digest(digests[-1], {"role": "assistant", "content": answer}), name)
    return choice.engine, choice.reason


def test_a_conversation_stays_where_its_context_is() -> None:
    router = Router(["a", "b"])
    assert turn(router, ["hi"]) == ("a", Reason.LOAD)
    for texts in (["hi", "yes", "more"], ["hi", "yes", "more", "yes", "and more"]):
        assert turn(router, texts) == ("a", Reason.HELD)


def test_what_nobody_knows_goes_to_the_least_busy() -> None:
    router = Router(["a", "b", "c"])
    chosen = [router.begin(digests_of("", {}, [{"role": "user", "content": str(i)}])) for i in range(6)]
    assert [choice.engine for choice in chosen if choice is not None] == ["a", "b", "c", "a", "b", "c"]
    assert router.loads == {"a": 2, "b": 2, "c": 2}


def test_a_shared_beginning_draws_turns_as_far_as_the_load_allows() -> None:
    router = Router(["a", "b"], prefix_slack=2)
    chosen = []
    for i in range(8):
        choice = router.begin(digests_of("", {}, said(str(i))))
        assert choice is not None
        chosen.append((choice.engine, choice.reason))
    assert chosen[:3] == [("a", Reason.LOAD), ("a", Reason.PREFIX), ("a", Reason.PREFIX)]
    assert chosen[3] == ("b", Reason.SPILLED)  # and now both know it
    assert all(reason is Reason.PREFIX for _, reason in chosen[4:])
    assert sorted(router.loads.values()) == [4, 4]


def test_other_tools_or_another_caller_are_another_beginning() -> None:
    router = Router(["a", "b"])
    first = router.begin(digests_of("", {}, said("hi")))
    other = router.begin(digests_of("salt", {}, said("hi")))
    assert first is not None and other is not None
    assert (first.engine, other.engine, other.reason) == ("a", "b", Reason.LOAD)


def test_a_conversation_leaves_an_engine_that_has_too_much_to_do() -> None:
    router = Router(["a", "b"], held_slack=3)
    turn(router, ["hi"])
    for i in range(4):
        router.begin(digests_of("", {}, said("hi", "yes", f"other {i}")))
    choice = router.begin(digests_of("", {}, said("hi", "yes", "more")))
    assert choice is not None
    assert (choice.engine, choice.reason, choice.instead_of) == ("b", Reason.SPILLED, "a")


def test_a_name_that_the_client_gave_finds_a_conversation_whose_messages_differ() -> None:
    router = Router(["a", "b"])
    turn(router, ["one"], name="mine")
    assert turn(router, ["rewritten"], name="mine")[0] == "a"
    router.begin(digests_of("", {}, [{"role": "user", "content": "x"}]))
    assert turn(router, ["rewritten once more"], name="mine") == ("a", Reason.HELD)


def test_conversations_of_a_dead_engine_are_recomputed_elsewhere_and_stay_there() -> None:
    router = Router(["a", "b"])
    turn(router, ["hi"])
    assert router.down("a") == 1 and router.up == ("b",)
    choice = router.begin(digests_of("", {}, said("hi", "yes", "more")))
    assert choice is not None
    assert (choice.engine, choice.reason, choice.instead_of) == ("b", Reason.RECOMPUTED, "a")
    router.end(
        "b", extend_digest(digests_of("", {}, said("hi", "yes", "more"))[-1], {"role": "assistant", "content": "k"})
    )
    router.up_again("a")
    assert turn(router, ["hi", "yes", "more", "k", "go on"]) == ("b", Reason.HELD)
    assert router.down("a") == 0


def test_turns_of_a_dead_engine_end_without_leaving_a_trace() -> None:
    router = Router(["a", "b"])
    digests = digests_of("", {}, said("hi"))
    choice = router.begin(digests)
    assert choice is not None and choice.engine == "a"
    router.down("a")
    router.end("a", extend_digest(digests[-1], {"role": "assistant", "content": "yes"}))
    again = router.begin(digests_of("", {}, said("hi", "yes", "more")))
    assert again is not None and (again.engine, again.reason) == ("b", Reason.LOAD)


def test_two_turns_of_one_name_at_once_find_an_engine_after_a_death() -> None:
    router = Router(["a", "b"])
    turn(router, ["one"], name="mine")
    router.down("a")
    chosen = [router.begin(digests_of("", {}, [{"role": "user", "content": str(i)}]), "mine") for i in range(3)]
    assert [(choice.engine, choice.reason) for choice in chosen if choice is not None] == [
        ("b", Reason.RECOMPUTED),
        ("b", Reason.LOAD),
        ("b", Reason.LOAD),
    ]


def test_nobody_is_chosen_where_all_are_down() -> None:
    router = Router(["a"])
    router.down("a")
    assert router.begin(digests_of("", {}, said("hi"))) is None
    router.up_again("a")
    assert router.begin(digests_of("", {}, said("hi"))) is not None


def test_what_is_remembered_is_bounded() -> None:
    router = Router(["a", "b"], max_known=10)
    turn(router, ["first"])
    for i in range(20):
        turn(router, [f"other {i}"])
    assert len(router._known) == 10
    assert turn(router, ["first", "yes", "more"])[1] is Reason.PREFIX  # of the system's message alone


@pytest.mark.parametrize("engines", [[], ["a", "a"]])
def test_engines_have_names_of_their_own(engines: list[str]) -> None:
    with pytest.raises(ValueError, match="different names"):
        Router(engines)


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "end", "down", "up"]), st.integers(0, 3), st.integers(0, 5)), max_size=60
    )
)
def test_loads_add_up_and_the_dead_are_never_chosen(steps: list[tuple[str, int, int]]) -> None:
    engines = ["a", "b", "c", "d"]
    router = Router(engines, held_slack=2, prefix_slack=1, max_known=12)
    under_way: list[tuple[str, bytes]] = []
    for kind, which, size in steps:
        if kind == "begin":
            digests = digests_of("", {}, said(*(str(i * which) for i in range(size))))
            choice = router.begin(digests, which)
            assert (choice is None) == (not router.up)
            if choice is not None:
                assert choice.engine in router.up
                under_way.append((choice.engine, digests[-1]))
        elif kind == "end" and under_way:
            engine, digest = under_way.pop(which % len(under_way))
            router.end(engine, extend_digest(digest, {"role": "assistant", "content": "0"}))
        elif kind == "down":
            router.down(engines[which])
        elif kind == "up":
            router.up_again(engines[which])
        assert router.loads == {engine: sum(e == engine for e, _ in under_way) for engine in engines}
        assert all(engine in router.up for known in router._known.values() for engine in known.engines)
