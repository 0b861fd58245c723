"""The emulated device: delayed work, random order, and the errors of a real device."""

import pytest
import torch

EMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated device"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not EMULATED, reason="needs the emulated device: `make test-emulated`"),
]
TRIES = 40  # Tries with random order. At least one must expose a missing synchronization.


def captured(work, mode="thread_local"):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode=mode):
        result = work()
    return graph, result


def test_operators_match_a_cpu():
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    expected = network(images).sin().sum()
    expected.backward()
    gradient = network[0].weight.grad.clone()
    network.zero_grad()
    network.cuda()
    made = network(images.to("cuda", memory_format=torch.channels_last)).sin().sum()
    made.backward()
    torch.testing.assert_close(made.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network[0].weight.grad.cpu(), gradient, rtol=1e-4, atol=1e-4)


def test_captured_work_runs_at_replay():
    count = torch.zeros((), device="cuda")

    def work():
        count.add_(1)
        return count * 10

    graph, result = captured(work)
    assert count.item() == 0 and result.isnan().item()
    for replays in (1, 2):
        graph.replay()
        assert (count.item(), result.item()) == (replays, 10 * replays)


@pytest.mark.parametrize(
    "read",
    [
        lambda value: value.item(),
        lambda value: value.cpu(),
        lambda value: value.nonzero(),
        lambda value: torch.cuda.synchronize(),
        lambda value: torch.ones(2).to("cuda")[value > 0],
    ],
)
def test_a_capture_may_not_read_values(read):
    value = torch.ones(2, device="cuda")[0]
    with pytest.raises((RuntimeError, torch.AcceleratorError)):
        captured(lambda: read(value + 1))
    assert (value + 1).item() == 2, "the device still works"


def test_operators_reject_tensors_of_two_devices():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


@pytest.mark.parametrize("waits", [False, True])
def test_only_events_order_streams(waits):
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    wrong = 0
    for _ in range(TRIES):
        with torch.cuda.stream(main):
            value = torch.zeros(1, device="cuda")
            value += 1
        if waits:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            seen = value * 2
        torch.cuda.synchronize()
        wrong += seen.item() != 2
    assert (wrong > 0) != waits


@pytest.mark.parametrize("waits", [False, True])
def test_only_events_order_nodes_of_a_graph(waits):
    side = torch.cuda.Stream()
    value = torch.zeros(1, device="cuda")

    def work():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        value.fill_(1)
        if waits:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            seen = value * 2
        main.wait_stream(side)
        return seen, value.fill_(0)

    graph, (seen, _) = captured(work)
    wrong = 0
    for _ in range(TRIES):
        graph.replay()
        wrong += seen.item() != 2
    assert (wrong > 0) != waits


def test_a_stream_that_never_joins_the_capture_is_an_error():
    side = torch.cuda.Stream()
    value = torch.zeros(1, device="cuda")

    def work():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return value + 1

    with pytest.raises(torch.AcceleratorError, match="unjoined"):
        captured(work)


@pytest.mark.parametrize("kept", [False, True])
def test_a_graph_does_not_keep_its_inputs_alive(kept):
    read = torch.ones(1000, device="cuda")
    graph, result = captured(lambda: read.sum())
    address = read.data_ptr()
    if not kept:
        del read
    others = [torch.full((1000,), 7.0, device="cuda") for _ in range(20)]
    graph.replay()
    assert (result.item() == 1000) == kept
    assert any(other.data_ptr() == address for other in others) != kept


def test_pinned_memory_is_copied_later():
    """Without waiting, changes of the host buffer may reach the device."""
    changed = 0
    for _ in range(TRIES):
        host = torch.ones(4).pin_memory()
        copy = host.to("cuda", non_blocking=True)
        host.fill_(2)
        changed += copy.sum().item() == 8
    assert changed > 0
