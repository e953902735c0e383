import pytest
import torch

from flowdata.head import tiles as head_tiles
from flowdata.head.output_layer import Head
from flowdata.head.tiles import tiles


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(head_tiles, "tile_size", lambda hidden: (100, 16))
    monkeypatch.setattr(head_tiles, "ROWS_OF_A_CORE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("vocabulary", [5, 32, 41])
def test_tiles_are_all_products_but_the_targets(kernel, vocabulary):
    torch.manual_seed(0)
    hidden, weight = torch.randn(21, 3), torch.randn(vocabulary, 3)
    bias, targets = torch.randn(vocabulary), torch.randint(0, vocabulary, (21,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    products, biases, starts = [], [], []
    for rows, tile, slice_bias, buffer in tiles(hidden, Head(weight, bias, kernel=kernel), targets):
        products.append(tile.clone())  # a tile is overwritten by the next slice
        biases.append(slice_bias)
        starts.append(rows.start)
        assert (buffer is None) == (kernel == "compiled")
        assert buffer is None or buffer.numel() >= tile.numel()
    step = 8 if kernel == "eager" else 21  # rows: those of two cores, or all
    assert starts == [*range(0, 21, step)] * -(-vocabulary // 16)
    of_slice = len(range(0, 21, step))
    slices = [torch.cat(products[i : i + of_slice]) for i in range(0, len(products), of_slice)]
    expected = (hidden @ weight.T).scatter(1, targets[:, None], -torch.inf)
    torch.testing.assert_close(torch.cat(slices, 1), expected)
    assert torch.equal(torch.cat(biases[::of_slice]), bias)
