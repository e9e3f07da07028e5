"""The walk's rules, one by one, on lists of a few operations; events are written "+x" and "-x"."""

from __future__ import annotations

from collections.abc import Sequence

from snugpt.estimate.operations import Buffer, Call, Operation, Weight
from snugpt.estimate.timeline import Event
from snugpt.estimate.walk import Walk, forward, recompute, sequence


def tensor(name: str) -> Buffer:
    return Buffer(name, "activations", 1, 0, "")


def written(events: Sequence[Event]) -> str:
    return " ".join(("+" if sign > 0 else "-") + buffer.name for sign, buffer in events)


def call(reads: Buffer, result: Buffer, **parts) -> Operation:
    """One input, one output; its gradient is a new tensor unless said otherwise."""
    grad = tensor(f"d{reads.name}")
    parts = {
        "forward": (result,),
        "backward": (grad,),
        "gradients": ((reads, grad),),
    } | parts
    return Operation(name="call", reads=(reads,), result=result, **parts)


X, Y, Z, OUT = (tensor(name) for name in "xyzo")
DOUT = tensor("do")


def test_a_buffer_is_allocated_where_first_named_and_freed_where_named_again():
    a, b = tensor("a"), tensor("b")
    assert written(sequence((a, b, a, b))) == "+a +b -a -b"
    assert written(sequence((a, a, a))) == "+a -a +a"


def test_forward_frees_a_tensor_after_its_last_reader():
    events = forward([call(X, Y), call(Y, Z), call(Z, OUT)], X, keep=True)
    assert written(events) == "+y -x +z -y +o -z"


def test_forward_frees_a_tensor_read_twice_only_once():
    assert written(forward([call(X, Y), call(X, Z)], X, keep=True)) == "+y +z -x"


def test_forward_keeps_what_backward_needs_only_when_there_will_be_one():
    operations = [call(X, Y, keeps=(X,)), call(Y, Z, keeps=(Z,)), call(Z, OUT)]
    assert written(forward(operations, X, keep=True)) == "+y +z -y +o"
    assert written(forward(operations, X, keep=False)) == "+y -x +z -y +o -z"


def test_forward_lets_go_what_a_call_made_beside_its_result_and_nobody_keeps():
    statistics = tensor("s")
    made = {"forward": (statistics, Y)}
    assert written(forward([call(X, Y, **made)], X, keep=True)) == "+s +y -s -x"
    kept = call(X, Y, keeps=(statistics,), **made)
    assert written(forward([kept], X, keep=True)) == "+s +y -x"


def test_forward_holds_the_entry_where_asked():
    assert written(forward([call(X, Y)], X, keep=True, hold_entry=True)) == "+y"


def test_backward_runs_in_reverse_and_frees_each_gradient_after_its_use():
    events, left = Walk().backward([call(X, Y), call(Y, OUT)], X, DOUT)
    assert written(events) == "+dy -do +dx -dy"
    assert left is not None
    assert left.name == "dx"


def test_backward_frees_what_was_kept_with_the_last_keeper():
    operations = [call(X, Y, keeps=(X, Y)), call(Y, OUT, keeps=(Y,))]
    events, _ = Walk().backward(operations, X, DOUT)
    assert written(events) == "+dy -do +dx -dy -x -y"


def test_backward_can_hold_the_entry_to_the_end():
    events, _ = Walk().backward([call(X, Y, keeps=(X,))], X, DOUT, hold_entry=True)
    assert written(events)[-2:] == "-x"
    assert written(events).count("-x") == 1


def gives_up(kept: Buffer) -> Operation:
    """A compiled call: it is done with what it kept before it makes its gradient."""
    grad, scratch = tensor(f"d{kept.name}"), tensor("s")
    parts = {"backward": (scratch, kept, grad, scratch), "gradients": ((kept, grad),)}
    return call(kept, OUT, keeps=(kept,), **parts)


def test_a_compiled_call_frees_what_it_kept_on_its_way():
    assert written(Walk().backward([gives_up(X)], X, DOUT)[0]) == "+s -x +dx -s -do"


def test_what_somebody_else_keeps_too_is_not_freed_on_the_way():
    stays, _ = Walk().backward([gives_up(X)], X, DOUT, entry_stays=True)
    assert written(stays) == "+s +dx -s -do"
    held, _ = Walk().backward([gives_up(X)], X, DOUT, hold_entry=True)
    assert written(held) == "+s +dx -s -do -x"
    both, _ = Walk().backward([call(X, Y, keeps=(Y,)), gives_up(Y)], X, DOUT)
    assert written(both) == "+s +dy -s -do +dx -dy -y"


def branches(backward_of_z: str) -> list[Operation]:
    """x -> y, x -> z, y + z -> o, where the sum hands one gradient to both or to y alone."""
    dy = tensor("dy")
    dz = None if backward_of_z == "shared" else tensor("dz")
    both = Operation(
        name="sum",
        reads=(Y, Z),
        result=OUT,
        forward=(OUT,),
        backward=(dy,) if dz is None else (dy, dz),
        gradients=((Y, dy), (Z, dz)),
    )
    return [call(X, Y), call(X, Z), both]


def test_a_second_gradient_is_added_into_the_first_where_nobody_else_holds_it():
    events, left = Walk().backward(branches("own"), X, DOUT)
    assert written(events) == "+dy +dz -do +dx -dz +dx -dy -dx"
    assert left is not None


def hands_on(*reads: Buffer) -> Operation:
    """A sum that gives each of its inputs the gradient that came in."""
    gradients = tuple((buffer, None) for buffer in reads)
    return Operation(name="sum", reads=reads, result=OUT, forward=(OUT,), gradients=gradients)


def test_the_gradient_of_a_residual_is_added_to_in_place_once_the_branch_let_go_of_it():
    events, left = Walk().backward([call(X, Z), hands_on(X, Z)], X, DOUT)
    assert written(events) == "+dx -dx"
    assert left is DOUT


def test_a_second_gradient_needs_a_new_tensor_where_the_first_is_still_held():
    operations = [call(X, Y), call(X, Z), hands_on(X, Y, Z)]
    events, left = Walk().backward(operations, X, DOUT)
    assert written(events) == "+dx +activation gradients -dx +dx -do -dx"
    assert left is not None
    assert left.name == "activation gradients"


WEIGHT = Weight("w", 2, 3)


def multiply(reads: Buffer, result: Buffer, gradient: str) -> Operation:
    grad, grad_weight = tensor(f"d{reads.name}"), tensor(gradient)
    return Operation(
        name="multiply",
        reads=(reads,),
        result=result,
        forward=(result,),
        backward=(grad, grad_weight),
        gradients=((reads, grad),),
        weight_gradients=((WEIGHT, grad_weight),),
    )


def test_a_parameter_takes_its_first_gradient_over_and_adds_the_later_ones():
    operations = [multiply(X, OUT, "dw")]
    assert written(Walk(first=True).backward(operations, X, DOUT)[0]) == "+dx +dw -do"
    assert written(Walk(first=False).backward(operations, X, DOUT)[0]) == "+dx +dw -do -dw"


def test_a_parameter_used_twice_waits_for_both_gradients():
    operations = [multiply(X, Y, "second"), multiply(Y, OUT, "first")]
    once = Walk(first=True, uses={"w": 2}).backward(operations, X, DOUT)[0]
    assert written(once) == "+dy +first -do +dx +second -dy -second"
    later = Walk(first=False, uses={"w": 2}).backward(operations, X, DOUT)[0]
    assert written(later) == "+dy +first -do +dx +second -dy -second -first"


def test_recomputing_stops_behind_the_last_call_that_keeps_something():
    operations = [call(X, Y, keeps=(X,)), call(Y, Z, keeps=(Y,)), call(Z, OUT)]
    assert written(recompute(operations, X)) == "+y +z -z"


def kept_chain() -> list[Operation]:
    """x -> y -> z -> o, of which y and z are kept."""
    return [call(X, Y), call(Y, Z, keeps=(Y, Z)), call(Z, OUT, keeps=(Z,))]


def test_what_is_made_again_is_freed_by_forward_like_what_nobody_keeps():
    operations = kept_chain()
    again = [Call((operations[1],), (Z,))]
    assert written(forward(operations, X, keep=True)) == "+y -x +z +o"
    assert written(forward(operations, X, keep=True, made_again=again)) == "+y -x +z +o -z"


def test_backward_makes_it_again_where_it_is_first_read_and_frees_it_as_if_it_had_been_kept():
    operations = kept_chain()
    plain, _ = Walk().backward(operations, X, DOUT)
    again, _ = Walk().backward(operations, X, DOUT, made_again=[Call((operations[1],), (Z,))])
    assert written(plain) == "+dz -do +dy -dz -y -z +dx -dy"
    assert written(again) == "+z " + written(plain)


def test_a_call_whose_input_is_missing_comes_after_the_call_that_makes_it():
    operations = kept_chain()
    calls = [Call((operations[0],), (Y,)), Call((operations[1],), (Z,))]
    events, _ = Walk().backward(operations, X, DOUT, made_again=calls)
    assert written(events).startswith("+y +z +dz -do")


def test_what_only_a_later_call_reads_goes_with_it():
    operations = [call(X, Y), call(Y, Z), call(Z, OUT, keeps=(Z,))]
    calls = [Call((operations[0],), (Y,)), Call((operations[1],), (Z,))]
    events, _ = Walk().backward(operations, X, DOUT, made_again=calls)
    assert written(events).startswith("+y +z -y +dz -do -z")


def test_statistics_of_what_is_made_again_are_made_and_go():
    statistics = tensor("s")
    norm = call(X, Y, forward=(statistics, Y), keeps=(Y, statistics))
    operations = [norm, call(Y, OUT, keeps=(Y,))]
    events, _ = Walk().backward(operations, X, DOUT, made_again=[Call((norm,), (Y,))])
    assert written(events).startswith("+s +y -s +dy -do")
