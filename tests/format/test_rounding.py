"""Lineage: two ways of storing rows have one recipe exactly when they leave the same numbers, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import actcache
from actcache.admin.exchange import export_space, import_file
from actcache.admin.migration import migrate
from actcache.errors import CodecOverflowError, FormatError, RecipeError, ShapeError
from actcache.format import codec
from actcache.format.recipe import Recipe
from tests.support import key, recipe
from tests.support.backends import each


def every(name):
    """All finite numbers of a dtype of two bytes, as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bits.view(np.float16).astype(np.float32) if name == "float16" else (bits.astype("u4") << 16).view("f4")
    return wide[np.isfinite(wide)]


def numbers(compute_dtype):
    """What was computed: numbers at which roundings go wrong, and those that are exact somewhere."""
    rng = np.random.default_rng(0)
    mantissas = rng.integers(1 << 23, 1 << 24, 20_000).astype(np.float64)
    wide = np.ldexp(mantissas * rng.choice([-1, 1], len(mantissas)), rng.integers(-60, 8, len(mantissas)) - 23)
    # The halves between two numbers of a dtype, and the nearest float32 beside them: where rounding twice differs.
    narrow = np.concatenate([every("float16")[::7], every("bfloat16")[::31]])
    near = np.concatenate([narrow * np.float32(1 + share * 2.0**-p) for p in (9, 12) for share in (-1, 1)])
    all32 = np.concatenate([wide.astype(np.float32), narrow, near, np.nextafter(near, 0), np.nextafter(near, np.inf)])
    all32 = all32[np.isfinite(all32) & (np.abs(all32) < 60_000)]
    if compute_dtype == "float32":
        return all32
    exact = all32.astype(np.float64)
    return np.concatenate([exact, exact * (1 + 2.0**-30), exact * (1 - 2.0**-30)])


def stored(rows, way):
    for name in way:
        one = codec.get(name)
        rows = one.decode(one.stored_rows(rows))
    return rows


WAYS = [way for steps in range(1, 5) for way in itertools.product(codec.FLOATS, repeat=steps)]


@pytest.mark.parametrize(("compute_dtype", "recipes"), [("float32", 11), ("float64", 16)])
def test_ways_have_one_recipe_exactly_when_their_numbers_are_the_same(compute_dtype, recipes):
    """Each way of up to four steps, by the recipe that the migrations make, against what storing really leaves."""
    given = numbers(compute_dtype)
    by_recipe, by_numbers = {}, {}
    kept = {}
    for way in WAYS:
        found = stored(kept.get(way[:-1], given), way[-1:])
        if len(way) < 4:
            kept[way] = found
        made = Recipe(model="m", layer=1, hidden_size=1, dtype=way[0], compute_dtype=compute_dtype)
        for name in way[1:]:
            made = made.stored_again(name)
        assert made.dtype == way[-1]
        by_recipe.setdefault(made.fingerprint, set()).add(way)
        by_numbers.setdefault((way[-1], found.tobytes()), set()).add(way)
    assert sorted(map(sorted, by_recipe.values())) == sorted(map(sorted, by_numbers.values()))
    assert len(by_recipe) == recipes
    longer = (way for steps in (5, 6) for way in itertools.product(codec.FLOATS, repeat=steps))
    assert len({(way[-1], codec.traces(way, compute_dtype)) for way in longer}) == recipes


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_number_of_two_bytes_survives_a_round_trip(name):
    """All of them, not a sample: by way of float32, and through the other dtype where it fits in there."""
    rows = every(name)
    assert stored(rows, ["float32", name]).astype(np.float32).tobytes() == rows.tobytes()
    other = "bfloat16" if name == "float16" else "float16"
    fits = rows[np.abs(rows) < 65_000]
    there = stored(fits, [other])
    again = stored(there, [name, other])
    assert again.tobytes() == there.tobytes()


def test_what_a_way_leaves():
    direct = recipe(dtype="float16")
    wide = direct.stored_again("float32")
    assert (wide.dtype, wide.via, wide.stored_as) == ("float32", ("float16",), "float32 via float16")
    assert wide != recipe(dtype="float32")
    assert wide.differences(recipe(dtype="float32")) == {"via": (["float16"], None)}
    assert wide.stored_again("float16") == direct
    assert recipe(dtype="float32").stored_again("float16") == direct
    twice = wide.stored_again("bfloat16").stored_again("float32")
    assert twice.stored_as == "float32 via bfloat16 via float16"
    assert Recipe.from_json(twice.to_json()) == twice
    assert "via" not in direct.identity()  # so that the names of spaces stay what they were
    assert direct.fingerprint == Recipe.from_json({**direct.to_json()}).fingerprint


@pytest.mark.parametrize(
    "via",
    [
        ("float16",),
        ["float32"],
        ("float16", "float16"),
        ("nothing",),
        "float16",
        5,
        [["float16"]],
        None,
        ["bfloat16"] * 9,
    ],
    ids=str,
)
def test_a_lineage_that_no_way_has_is_refused(via):
    with pytest.raises(RecipeError):
        recipe(dtype="float16", via=via)
    made = recipe(dtype="float16").to_json()
    made["identity"]["via"] = via
    with pytest.raises(FormatError):
        Recipe.from_json(made)


def test_traces_of_nothing_lost():
    for way in WAYS:
        if set(way[:-1]) <= {"float32"}:
            assert codec.traces(way, "float32") == ()
            assert codec.traces(way, "bfloat16") == ()


# --- stores -----------------------------------------------------------------------------------------------------------

THIRDS = np.arange(1, 41, dtype=np.float32).reshape(5, 8) / 3


@each()
def test_a_widened_space_is_no_space_for_float32(kind, tmp_path):
    """The report: a recycler for float32 found everything present, and the numbers were float16's."""
    with actcache.open(kind.url(tmp_path / "old")) as old, actcache.open(kind.url(tmp_path / "new")) as new:
        with old.space(recipe(dtype="float16")) as space:
            space.put([key(0)], [THIRDS])
        done = migrate(old, new, dtype="float32")
        assert done.equal
        assert [one.target for one in done.spaces] == [recipe(dtype="float16").stored_again("float32").fingerprint]
        with new.space(recipe(dtype="float32")) as space:
            assert space.created
            assert len(space) == 0
        nearest, fields = new.nearest(recipe(dtype="float32"))[0]
        assert (nearest.stored_as, set(fields)) == ("float32 via float16", {"via"})
        with new.space(nearest) as space:
            (entry,) = space.get([key(0)])
            assert entry.activations.dtype == np.float32
            np.testing.assert_array_equal(entry.activations, THIRDS.astype(np.float16).astype(np.float32))
            space.put([key(1)], [THIRDS])  # what is added is rounded as what is there was
            np.testing.assert_array_equal(space.get([key(1)])[0].activations, entry.activations)


@each()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_back_is_where_it_was(kind, tmp_path, dtype):
    """float16, then float32, then float16: the same name, the same bits, and the same digests as at first."""
    stores = [kind.url(tmp_path / name) for name in ("one", "two", "three")]
    with actcache.open(stores[0]) as old, old.space(recipe(dtype=dtype)) as space:
        space.put([key(0)], [THIRDS])
    for (source, target), there in zip(itertools.pairwise(stores), ["float32", dtype], strict=True):
        with actcache.open(source, "r") as old, actcache.open(target) as new:
            assert migrate(old, new, dtype=there).equal
    found = []
    for url in (stores[0], stores[2]):
        with actcache.open(url, "r") as store, store.space(recipe(dtype=dtype)) as space:
            found.append((space.get([key(0)])[0].activations.tobytes(), space.stored_checksums([key(0)]).tolist()))
    assert found[0] == found[1]


@each()
def test_a_narrowed_space_is_the_direct_one(kind, tmp_path):
    with actcache.open(kind.url(tmp_path / "old")) as old, actcache.open(kind.url(tmp_path / "new")) as new:
        with old.space(recipe(dtype="float32")) as space:
            space.put([key(0)], [THIRDS])
        assert migrate(old, new, dtype="float16").equal
        with new.space(recipe(dtype="float16")) as space:
            assert not space.created
            assert space.get([key(0)])[0].activations.tobytes() == THIRDS.astype(np.float16).tobytes()


def test_float64_is_not_narrowed_in_two_steps_under_the_name_of_one(tmp_path):
    """float64 to float32 to float16 rounds twice; the codec of float16 rounds once."""
    between = np.full((1, 8), 1 + 2.0**-11 + 2.0**-40)  # a little above the half between two numbers of float16
    options = {"compute_dtype": "float64"}
    with actcache.open(tmp_path / "old") as old, actcache.open(tmp_path / "new") as new:
        with old.space(recipe(dtype="float32", **options)) as space:
            space.put([key(0)], [between])
        assert migrate(old, new, dtype="float16").equal
        with new.space(recipe(dtype="float16", **options)) as space:
            assert space.created
            space.put([key(0)], [between])
            direct = space.get([key(0)])[0].activations
        with new.space(recipe(dtype="float32", **options).stored_again("float16")) as space:
            assert (space.get([key(0)])[0].activations != direct).all()


def test_what_is_too_large_on_the_way_is_refused(tmp_path):
    wide = recipe(dtype="float16").stored_again("float32")
    with (
        actcache.open(tmp_path / "store") as store,
        store.space(wide) as space,
        pytest.raises(CodecOverflowError, match="too large for float16"),
    ):
        space.put([key(0)], [np.full((1, 8), 1e6, np.float32)])


def test_a_file_of_a_widened_space_comes_back(tmp_path):
    """65,504 is float16's largest; bfloat16 rounds it up to 65,536, which float16 does not hold."""
    rows = np.full((2, 8), 65_504, np.float32)
    rows[0, 0] = 1 / 3
    rounded = recipe(dtype="float16").stored_again("bfloat16")
    with actcache.open(tmp_path / "old") as old, actcache.open(tmp_path / "new") as new:
        with old.space(recipe(dtype="float16")) as space:
            space.put([key(0)], [rows])
        assert migrate(old, new, dtype="bfloat16").equal
        with new.space(rounded) as space:
            held = space.get([key(0)])[0].activations
            assert held[1, 0] == 65_536
            for suffix in (".npz", ".safetensors"):
                export_space(space, tmp_path / f"file{suffix}")
    for suffix in (".npz", ".safetensors"):
        with actcache.open(tmp_path / suffix) as store:
            done = import_file(store, tmp_path / f"file{suffix}")
            assert (done.fingerprint, done.stored) == (rounded.fingerprint, 1)
            with store.space(rounded) as space:
                np.testing.assert_array_equal(space.get([key(0)])[0].activations, held)
            assert len(store.fingerprints()) == 1


NARROW = [np.ones((1, 8), np.float16), torch.ones(1, 8, dtype=torch.float16), torch.ones(1, 8, dtype=torch.bfloat16)]


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, ()),
        ({"dtype": "float16"}, ("float16",)),
        ({"dtype": "bfloat16"}, ("bfloat16",)),
        ({"compute_dtype": "float16"}, ("float16",)),
        ({"compute_dtype": "bfloat16", "dtype": "float16"}, ("float16", "bfloat16")),
        ({"via": ("float16",)}, ("float16",)),
        ({"compute_dtype": "float64"}, ()),
    ],
    ids=str,
)
def test_rows_with_fewer_digits_than_the_recipe_promises_are_refused(changes, fits, tmp_path):
    """Where a recycler would take them for its own; a recipe without weights is the caller's own word."""
    with actcache.open(tmp_path / "store") as store:
        for number, rows in enumerate(NARROW):
            with store.space(recipe(**changes)) as space:
                assert space.put([key(number)], [rows]) == 1
            with store.space(recipe(weights="ab" * 32, **changes)) as space:
                if str(rows.dtype).removeprefix("torch.") in fits:
                    assert space.put([key(number)], [rows]) == 1
                else:
                    with pytest.raises(ShapeError, match="the digits are gone"):
                        space.put([key(number), key(99)], [rows, rows])
                    assert not space.contains([key(number), key(99)]).any()
                assert space.put([key(-1 - number)], [np.ones((1, 8))]) == 1


class Typed:
    """Rows of a dtype that NumPy and torch have not, as extensions of NumPy (ml_dtypes) name theirs."""

    shape, ndim = (1, 8), 2

    def __init__(self, name):
        self.dtype = type("dtype", (), {"name": name})()

    def __len__(self):
        return 1

    def __array__(self, dtype=None, copy=None):
        return np.ones((1, 8), np.float32)


ROWS = torch.linspace(-1, 1, 8).reshape(1, 8)
FEWER = {
    "float8_e4m3fn": ROWS.to(torch.float8_e4m3fn),
    "float8_e5m2": ROWS.to(torch.float8_e5m2),
    "qint8": lambda: torch.quantize_per_tensor(ROWS, 0.05, 0, torch.qint8),  # warns of its end
    "quint8": lambda: torch.quantize_per_channel(ROWS, torch.tensor([0.05]), torch.tensor([9]), 0, torch.quint8),
    "float16": ROWS.numpy().astype(">f2"),
    "float4_e2m1fn": Typed("float4_e2m1fn"),
    "bfloat16": Typed("bfloat16"),
    "int8": (ROWS * 100).to(torch.int8),
    "int64": np.ones((1, 8), np.int64),
    "a list, which says no dtype": list(ROWS.numpy().astype(np.float16)),  # np.asarray makes float16 of it
    "a tuple, which says no dtype": (ROWS.numpy().astype(np.float16)[0],),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", FEWER)
@pytest.mark.parametrize("dtype", codec.names())
def test_only_what_is_known_to_have_the_digits_is_put(name, dtype, tmp_path):
    if name == dtype:
        pytest.skip("a float32 fill stores just that")
    one = recipe(weights="ab" * 32, dtype=dtype)
    fewer = FEWER[name]() if callable(FEWER[name]) else FEWER[name]
    with actcache.open(tmp_path / "store") as store, store.space(one) as space:
        for overwrite in (False, True):
            with pytest.raises(ShapeError, match=f"array 1 (holds|is) {name}"):
                space.put([key(0), key(1)], [ROWS.double(), fewer], overwrite=overwrite)
        assert len(space) == 0


@pytest.mark.parametrize("compute_dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rows_in_a_wider_dtype_have_all_digits(compute_dtype, tmp_path):
    one = recipe(weights="ab" * 32, compute_dtype=compute_dtype)
    given = [ROWS.numpy().astype(np.longdouble), ROWS.double(), ROWS.numpy().astype(">f8")]
    given += [] if compute_dtype == "float64" else [ROWS, ROWS.numpy().astype(">f4"), ROWS.to_sparse()]
    given += [ROWS.to(getattr(torch, compute_dtype))]
    with actcache.open(tmp_path / "store") as store, store.space(one) as space:
        assert space.put([key(n) for n in range(len(given))], given) == len(given)


@pytest.mark.parametrize("dtype", [*codec.names(), "int8+zstd"])
def test_only_what_is_stored_is_put_as_stored(dtype, tmp_path):
    """``put_stored`` rounds nothing, so it takes nothing that is not in the space's own stored form."""
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=dtype)) as space:
        rows = codec.get(dtype).stored_rows(ROWS.numpy())
        offsets = np.array([0, len(rows)])
        for wrong in (rows.astype(np.float64), rows[:, :-1], rows[:-1]):
            with pytest.raises(ShapeError, match="and the space stores"):
                space.put_stored([key(0)], {"values": wrong}, offsets)
        assert len(space) == 0
        assert space.put_stored([key(0)], {"values": rows}, offsets) == 1
        assert space.put_stored([key(0)], {"values": rows}, offsets) == 0
        assert space.read_packed([key(0)]).columns["values"].tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_no_writer_stores_is_not_put_as_stored(dtype, tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=dtype)) as space:
        rows = codec.get(dtype).stored_rows(ROWS.numpy())
        rows[-1].view(np.uint8)[-4:] = np.array([np.nan], "<f4").view(np.uint8)
        with pytest.raises(FormatError, match="no writer stores"):
            space.put_stored([key(0)], {"values": rows}, np.array([0, len(rows)]))
        assert len(space) == 0


def test_float32_of_float64_rows_would_be_rounded_twice(tmp_path):
    """Their float16 is not that of the float64 rows; their bfloat16 is, for it is made by way of float32."""
    with actcache.open(tmp_path / "store") as store:
        for dtype, taken in (("float16", False), ("bfloat16", True), ("float32", True)):
            with store.space(recipe(weights="ab" * 32, dtype=dtype, compute_dtype="float64")) as space:
                if taken:
                    assert space.put([key(0)], [ROWS]) == 1
                else:
                    with pytest.raises(ShapeError, match="the digits are gone"):
                        space.put([key(0)], [ROWS])
