"""Which turns are known by which messages, and what is forgotten."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from jaxcept.conversations import TURN_OVERHEAD, Conversations, IdBuffer, KnownTurn, digests_of, extend_digest

ASK = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}


def turn(count: int, request_id: str | None = None, conversation: str | None = None) -> KnownTurn:
    return of_ids(range(count), request_id=request_id, conversation=conversation)


def of_ids(ids: Sequence[int], **facts: Any) -> KnownTurn:
    return KnownTurn(IdBuffer(array("i", ids)), len(ids), **facts)


def digests(*messages: dict[str, Any], salt: str = "", **settings: Any) -> list[bytes]:
    return digests_of(salt, settings, messages)


def test_the_longest_known_beginning_is_found():
    known = Conversations()
    first, second = turn(3), turn(5)
    known.remember(digests(ASK, SAID)[-1], first)
    known.remember(digests(ASK, SAID, ASK, SAID)[-1], second, first)
    found = known.find(digests(ASK, SAID, ASK, SAID, ASK))
    assert found is not None and found.turn is second and found.num_messages == 4
    found = known.find(digests(ASK, SAID, {"role": "user", "content": "changed"}, SAID, ASK))
    assert found is not None and found.turn is first and list(found.turn.ids) == [0, 1, 2]
    assert known.find(digests({**ASK, "content": "x"}, SAID, ASK)) is None
    assert known.find(digests(ASK, SAID, ASK, salt="another")) is None
    assert known.find(digests(ASK, SAID, ASK, tools=["another"])) is None
    assert known.num_ids == 5 + 2 * TURN_OVERHEAD and first.buffer is second.buffer, "ids are kept once"


def stored(*turns: KnownTurn) -> int:
    """Ids that the buffers of these turns hold."""
    return sum(len(ids) for ids in {id(each.buffer): each.buffer.ids for each in turns}.values())


def test_the_turns_of_a_long_conversation_share_one_buffer():
    known, turns = Conversations(), [turn(100)]
    known.remember(b"0", turns[0])
    for i in range(1, 50):
        turns.append(turn(100 * (i + 1)))
        known.remember(b"%d" % i, turns[i], turns[i - 1])
    assert stored(*turns) == 5000 and known.num_ids == 5000 + 50 * TURN_OVERHEAD
    assert all(list(each.ids) == list(range(each.num_ids)) for each in turns)


def test_a_branch_has_ids_of_its_own_which_are_counted():
    known = Conversations()
    root, one, other = turn(10), turn(14), of_ids([*range(10), 99, 98])
    again = turn(16)
    for i, (made, before) in enumerate([(root, None), (one, root), (other, root), (again, one)]):
        known.remember(b"%d" % i, made, before)
    assert one.buffer is root.buffer is again.buffer and other.buffer is not root.buffer
    assert list(root.ids) == list(range(10)) and list(one.ids) == list(range(14)) and other.ids[10] == 99
    assert known.num_ids == stored(root, one, other, again) + 4 * TURN_OVERHEAD == 16 + 12 + 4 * TURN_OVERHEAD


def test_what_is_counted_is_what_is_held_whatever_was_forgotten():
    known = Conversations(max_ids=3 * TURN_OVERHEAD + 100)
    first, second, third = turn(10), turn(20), turn(30)
    known.remember(b"1", first)
    known.remember(b"2", second, first)
    known.remember(b"3", turn(60))
    known.remember(b"4", third, second)
    assert known.find([b"", b"1", b"next"]) is None, "the first turn is forgotten, the second has its ids still"
    assert list(second.ids) == list(range(20)) and second.buffer is third.buffer
    assert known.num_ids == 30 + 60 + 3 * TURN_OVERHEAD
    known.remember(b"5", turn(3 * TURN_OVERHEAD))
    assert known.num_ids == 3 * TURN_OVERHEAD + TURN_OVERHEAD, "with the last of its turns a buffer goes"
    known.remember(b"6", late := turn(40), third)
    assert late.buffer is not third.buffer and known.num_ids == 40 + TURN_OVERHEAD, "nothing hangs on what is forgotten"


def test_what_clients_write_differently_is_the_same_message():
    def call(arguments: Any, call_id: str = "c") -> dict[str, Any]:
        made = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [made]}

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return extend_digest(b"", one) == extend_digest(b"", other)

    assert same(call('{"a": 1, "b": 2}'), call('{"b":2,"a":1}')) and same(call('{"a": 1}'), call({"a": 1}))
    assert same(call(""), call("{}")) and not same(call("{}"), call("{}", "d"))
    assert same(call("{}"), {**call("{}"), "content": "", "refusal": None, "annotations": []})
    assert same({"role": "assistant", "content": " b\n"}, {"role": "assistant", "content": "b", "tool_calls": []})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert same({"role": "user", "content": parts}, {"role": "user", "content": "a\nb"})
    assert not same({"role": "user", "content": "a "}, ASK) and not same({**ASK, "name": "x"}, ASK)
    assert not same({"role": "tool", "content": "a", "tool_call_id": "1"}, {"role": "tool", "content": "a"})


def test_a_context_is_taken_once_and_the_named_conversation_comes_first():
    known = Conversations()
    one, other, named = turn(3, "r1"), turn(3, "r2"), turn(3, None, "mine")
    end = digests(ASK, SAID)
    for made in (one, named, other):
        known.remember(end[-1], made)
    asked = digests(ASK, SAID, ASK)
    assert known.find(asked, "mine").turn is named  # type: ignore[union-attr]
    assert known.find(asked).turn is other  # type: ignore[union-attr]
    assert known.take(other) == "r2" and known.take(other) is None and known.num_held == 1
    assert known.find(asked).turn is one  # type: ignore[union-attr]


def test_what_is_too_much_is_given_up_oldest_first():
    known = Conversations(max_ids=3 * (10 + TURN_OVERHEAD), max_held=2)
    ends = [digests({**ASK, "content": str(i)}, SAID) for i in range(4)]
    assert known.remember(ends[0][-1], turn(10, "r0")) == []
    assert known.remember(ends[1][-1], turn(10, "r1")) == []
    assert known.remember(ends[2][-1], turn(10, "r2")) == ["r0"], "only two may wait"
    assert known.find([*ends[0], b"next"]) is not None, "its ids are known still"
    assert known.remember(ends[3][-1], turn(10)) == ["r1"], "used last but one, for the first was just looked at"
    assert known.find([*ends[1], b"next"]) is None and known.num_held == 1
    same = Conversations()
    given_up = [same.remember(ends[0][-1], turn(1, f"r{i}")) for i in range(10)]
    assert [each for some in given_up for each in some] == ["r0", "r1"], "eight turns of the same messages"
