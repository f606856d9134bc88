from headrace.protos import messages as m
from hypothesis import given
from hypothesis import strategies as st

uint32 = st.integers(0, 2**32 - 1)
score = st.floats(0, 1, width=32)
labels = st.builds(m.Label, uint32, score)
boxes = st.builds(m.Box, uint32, score, *[st.floats(-1e4, 1e4, width=32)] * 4)
class_maps = st.builds(m.ClassMap, uint32, uint32, st.binary(max_size=20))
outputs = st.builds(
    m.TailOutput,
    st.text(max_size=20),
    st.lists(labels, max_size=3).map(tuple),
    st.lists(boxes, max_size=3).map(tuple),
    st.none() | class_maps,
)
results = st.builds(
    m.Result,
    uint32,
    st.sampled_from(m.Status),
    st.text(max_size=20),
    st.lists(outputs, max_size=3).map(tuple),
    st.builds(m.Timing, *[uint32] * 4),
    uint32,
    uint32,
)


@given(results)
def test_a_result_with_labels_boxes_class_maps_and_several_tails_comes_back(result):
    data = m.result_response(result).SerializeToString()
    assert m.read_response(m.StreamResponse.FromString(data)) == result


@given(st.lists(results, max_size=4))
def test_several_results_of_one_response_come_back(several):
    response = m.StreamResponse()
    response.results.SetInParent()
    for result in several:
        m.fill_result(response.results.results.add(), result)
    response = m.StreamResponse.FromString(response.SerializeToString())
    assert m.results_of(response) == several
    assert m.read_response(response) is None, "a greeting is none of them"


@given(results)
def test_a_single_result_is_the_only_one_of_its_response(result):
    assert m.results_of(m.result_response(result)) == [result]
    assert m.results_of(m.welcome_response(m.Welcome(b"f", 1, 1))) == []


@given(st.binary(max_size=50), uint32)
def test_frames_and_hello_come_back(packet, remaining):
    frame = m.Frame(packet, remaining)
    assert m.read_request(m.StreamRequest.FromString(m.frame_request(frame).SerializeToString())) == frame
    hello = m.Hello(packet, remaining, "cam", "0.1", predicts=True, several=True)
    assert m.read_request(m.StreamRequest.FromString(m.hello_request(hello).SerializeToString())) == hello


def test_welcome_comes_back():
    welcome = m.Welcome(b"f" * 32, 100, 3, "0.1", "lite0", (1, 2, 39))
    assert m.read_response(m.StreamResponse.FromString(m.welcome_response(welcome).SerializeToString())) == welcome


def test_what_is_neither_reads_as_none():
    assert m.read_request(m.StreamRequest()) is None
    assert m.read_response(m.StreamResponse()) is None


def test_a_status_of_a_later_version_reads_as_unspecified():
    message = m.ResultMessage(status=77)
    assert m.read_result(message).status is m.Status.UNSPECIFIED


def test_statuses_have_the_numbers_of_the_wire():
    from headrace.protos.headrace_pb2 import Status

    assert {f"STATUS_{s.name}": s.value for s in m.Status} == dict(Status.items())
