import gzip
import io
import urllib.error

import numpy as np
import pytest
import torch

from nervure import data
from nervure._kit import BadData, UnknownId
from nervure.data import fashion, sources


@pytest.fixture(autouse=True)
def _fresh():
    sources._arrays.cache_clear()


def test_splits_are_disjoint_scaled_and_drawn_by_the_seed():
    one, same, other = (data.load("digits", seed=s, validation=200, test=300) for s in (1, 1, 2))
    assert (len(one.train_x), len(one.validation_x), len(one.test_x)) == (1297, 200, 300)
    assert torch.equal(one.train_x, same.train_x)
    assert not torch.equal(one.train_y, other.train_y)
    assert float(one.train_x.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(one.train_x.std()) == pytest.approx(1.0, abs=1e-2)
    rows = torch.cat([one.train_x, one.validation_x, one.test_x]).flatten(1)
    from sklearn.datasets import load_digits

    assert len(torch.unique(rows.round(decimals=3), dim=0)) == len(np.unique(load_digits().data, axis=0))
    assert one.flat().train_x.shape == (1297, 64)


def test_tables_are_scaled_column_by_column():
    wine = data.load("wine")
    assert torch.allclose(wine.train_x.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(wine.train_x.std(0), torch.ones(13), atol=1e-2)


@pytest.mark.parametrize("name", [n for n in data.names() if n != "fashion-mnist"])
def test_named_sets_load(name):
    found = data.load(name)
    assert found.train_x.dtype == torch.float32
    assert 0 <= int(found.train_y.min()) <= int(found.train_y.max()) < found.classes


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_npz_files(tmp_path):
    x, y = np.random.rand(50, 4), np.arange(50) % 3
    found = data.load(npz(tmp_path / "d.npz", x=x, y=y))
    assert (found.classes, found.shape) == (3, (4,))
    official = data.load(npz(tmp_path / "e.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9]))
    assert len(official.test_x) == 9


def test_csv_files(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b,label\n" + "".join(f"{i},{i % 7},{'cat' if i % 2 else 'dog'}\n" for i in range(30)))
    found = data.load(str(path))
    assert (found.classes, found.shape) == (2, (2,))
    plain = tmp_path / "plain.csv"
    plain.write_text("".join(f"{i},{i % 7},{i % 3}\n" for i in range(30)))
    assert data.load(str(plain)).classes == 3


def test_image_folders(tmp_path):
    from PIL import Image

    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 255, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    assert data.load(str(tmp_path)).shape == (3, 6, 5)
    (tmp_path / "cats" / "bad.png").write_bytes(b"not an image")
    sources._arrays.cache_clear()
    with pytest.raises(BadData, match=r"bad\.png cannot be read as an image"):
        data.load(str(tmp_path))


def test_factories(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import numpy as np\ndef make():\n    return np.ones((20, 2)), np.arange(20) % 2\n")
    assert data.load(f"{path}:make").classes == 2
    path.write_text("def make():\n    return 3\n")
    sources._arrays.cache_clear()
    with pytest.raises(BadData, match="returned no data"):
        data.load(f"{path}:make")


X, Y = np.random.rand(20, 3), np.arange(20) % 2


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X}, "no inputs and labels"),
        ({"x": X, "y": Y[:5]}, "labels of the training part.*do not fit"),
        ({"x": np.where(X > 0.99, np.nan, np.nan), "y": Y}, "missing or infinite"),
        ({"x": X, "y": Y - 1}, "out of range"),
        ({"x": X, "y": Y * 0}, "one class only"),
        ({"x": X, "y": Y.astype(float)}, "not integers"),
        ({"x": X[:0], "y": Y[:0]}, "no samples"),
        ({"x": X[:, 0], "y": Y}, "no samples"),
        ({"x": X.astype("U5"), "y": Y}, "not numeric"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y + 5}, "test labels.*out of range"),
    ],
)
def test_bad_arrays_say_what_is_wrong(tmp_path, arrays, match):
    with pytest.raises(BadData, match=match):
        data.load(npz(tmp_path / "bad.npz", **arrays))


def test_bad_files_say_what_is_wrong(tmp_path):
    empty = tmp_path / "empty.npz"
    empty.touch()
    with pytest.raises(BadData, match="is empty"):
        data.load(str(empty))
    with pytest.raises(BadData, match="no such file"):
        data.load(str(tmp_path / "absent.csv"))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{"a": 1}], dtype=object), y=np.array([1]))
    with pytest.raises(BadData, match="without unpickling"):
        data.load(str(pickled))
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("1,2,0\n1,1\n")
    with pytest.raises(BadData, match="line 2 is ragged"):
        data.load(str(ragged))
    words = tmp_path / "words.csv"
    words.write_text("a,b,label\n1,red,0\n2,blue,1\n")
    with pytest.raises(BadData, match="a feature that is no number"):
        data.load(str(words))
    with pytest.raises(UnknownId, match="fashion-mnist"):
        data.load("fashion-mnits")


def fake_home(monkeypatch, tmp_path, content):
    monkeypatch.setenv("NERVURE_CACHE", str(tmp_path))
    monkeypatch.setattr(fashion, "SYSTEM", tmp_path / "nowhere")
    monkeypatch.setattr(fashion.shutil, "which", lambda name: None)
    asked = []

    def answer(address, timeout):
        asked.append(address)
        made = content(address)
        if isinstance(made, Exception):
            raise made
        return io.BytesIO(made)

    monkeypatch.setattr(fashion.urllib.request, "urlopen", answer)
    return asked


def test_a_damaged_download_leaves_nothing_behind(monkeypatch, tmp_path):
    fake_home(monkeypatch, tmp_path, lambda address: gzip.compress(b"half of it"))
    with pytest.raises(BadData, match=r"arrived damaged.*--data digits"):
        data.fetch_fashion_mnist()
    assert list((tmp_path / "fashion-mnist").iterdir()) == []


def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    fake_home(monkeypatch, tmp_path, lambda address: urllib.error.URLError("no route"))
    with pytest.raises(BadData, match=r"cannot be had.*no route.*apt install"):
        data.fetch_fashion_mnist()


def test_an_interrupted_download_goes_on_where_it_stopped(monkeypatch, tmp_path):
    whole = {name: gzip.compress(name.encode()) for name in fashion.FILES}
    import hashlib

    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in whole}
    monkeypatch.setattr(fashion, "FILES", sums)
    broken = iter([False, True, False, False, False, False])

    def content(address):
        if next(broken):
            return urllib.error.URLError("connection reset")
        return whole[address.rpartition("/")[2]]

    asked = fake_home(monkeypatch, tmp_path, content)
    with pytest.raises(BadData, match="connection reset"):
        data.fetch_fashion_mnist()
    assert data.fetch_fashion_mnist() == tmp_path / "fashion-mnist"
    assert len(asked) == 5
    assert fashion.find() == tmp_path / "fashion-mnist"


@pytest.mark.parametrize("by", ["class", "chance"])
def test_parts_are_disjoint_and_complete(by):
    y = torch.arange(50) % 7
    found = data.parts(y, 3, by=by, seed=1)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(50))
    if by == "class":
        classes = [set(y[part].tolist()) for part in found]
        assert sum(len(one) for one in classes) == len(set.union(*classes)) == 7
    splits = data.load("digits", seed=0)
    assert sum(len(part.train_y) for part in splits.parts(2, by=by, seed=0)) == len(splits.train_y)
