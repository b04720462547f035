"""Spectra: the type, the file formats, the splits, and what happens to bad input."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest

from deadlayer_cres.core import ConfigError, DataError, InputError
from deadlayer_cres.deadlayer import data
from deadlayer_cres.deadlayer.data import (
    PUBLISHED_EXPOSURE,
    Spectra,
    SplitConfig,
    concatenate,
    normalise,
    parse_labels,
    plot_labels,
    plot_spectra,
    prepare,
    read_folder,
    read_histogram,
    read_lh5,
    read_spectra,
    read_store,
    shared_data,
    split_by_block,
    write_folder,
    write_lh5,
    write_store,
)

NAME = "V05268A-ba_HS4-top-0r-78z_g_l_FCCD{}mm_DLF{}_fracFCCDbore0.5.h5"


def make(n=6, bins=900, seed=0, exposure=2.0, **kwargs):
    rng = np.random.default_rng(seed)
    defaults = {
        "counts": rng.poisson(20, (n, bins)), "edges_keV": np.arange(bins + 1) * 0.5,
        "fccd_in_mm": np.round(np.sort(rng.uniform(0, 2, n)), 4), "dlf": np.round(rng.uniform(0, 1, n), 4),
        "exposure": exposure, "provenance": {"source": "test"},
    }
    return Spectra(**defaults | kwargs)


def same(a, b):
    return a.checksum == b.checksum


@pytest.fixture
def spectra():
    return make()


@pytest.fixture
def folder(tmp_path, spectra):
    write_folder(spectra, tmp_path / "mc")
    return tmp_path / "mc"


@pytest.fixture(scope="session")
def published():
    root = shared_data()
    if root is None or not (root / "V05268A").is_dir():
        pytest.skip("the published spectra are not here; set DEADLAYER_CRES_DATA")
    return root / "V05268A"


def left_behind(path):
    return sorted(p.name for p in path.iterdir())


# ---- the type


def test_indexing_keeps_rows_together(spectra):
    assert len(spectra) == 6 and len(spectra[2]) == 1 and len(spectra[-1]) == 1
    for index in (slice(1, 4), np.array([5, 0]), spectra.dlf > 0.5, [1, 2]):
        part = spectra[index]
        assert (part.counts == spectra.counts[index]).all() and (part.fccd_in_mm == spectra.fccd_in_mm[index]).all()
        assert (part.dlf == spectra.dlf[index]).all() and part.exposure == 2
    assert same(concatenate(list(spectra)), spectra)
    with pytest.raises(IndexError):
        spectra[6]
    assert "6 x 900 bins" in repr(spectra) and "unknown" in repr(make(fccd_in_mm=np.full(6, np.nan)))


def test_empty_set_is_allowed(spectra, tmp_path):
    none = spectra[spectra.dlf > 2]
    write_store(none, tmp_path / "none.h5")
    assert len(read_store(tmp_path / "none.h5")) == 0 and "unknown" in repr(none)


def test_energy_range_and_rebin(spectra):
    cut = spectra.select_energy(5, 450)
    assert cut.counts.shape == (6, 890) and cut.edges_keV[[0, -1]].tolist() == [5, 450]
    assert (cut.counts == spectra.counts[:, 10:]).all() and cut.centres_keV[0] == 5.25
    assert spectra.select_energy(5.2, 6.9).edges_keV.tolist() == [5.5, 6.0, 6.5]
    coarse = cut.rebin(5)
    assert coarse.counts.shape == (6, 178) and np.allclose(np.diff(coarse.edges_keV), 2.5)
    assert (coarse.counts[:, 0] == cut.counts[:, :5].sum(1)).all() and coarse.counts.sum() == cut.counts.sum()
    for n in (4, 0, -1):
        with pytest.raises(ConfigError, match="divides 890"):
            cut.rebin(n)
    for low, high in ((500, 600), (10, 10.2), (20, 10)):
        with pytest.raises(ConfigError, match="energy range"):
            spectra.select_energy(low, high)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"counts": np.full((6, 900), -1)}, "row 0: expected whole counts >= 0, found -1"),
        ({"counts": np.full((6, 900), np.nan)}, "found nan"),
        ({"counts": np.full((6, 900), np.inf)}, "found inf"),
        ({"counts": np.full((6, 900), 0.5)}, "found 0.5"),
        ({"counts": np.full((6, 900), 2**63, np.uint64)}, "whole counts"),
        ({"counts": np.full((6, 900), "1")}, "counts as numbers"),
        ({"counts": np.ones(900, int)}, "shape"),
        ({"edges_keV": np.arange(900.0)}, "901 edges"),
        ({"edges_keV": np.r_[0, np.arange(900.0)]}, "increase, found 0.0 at edge 1"),
        ({"edges_keV": np.r_[np.arange(900.0), np.nan]}, "increase, found nan at edge 900"),
        ({"edges_keV": np.r_[np.arange(900.0), np.inf]}, "increase, found inf at edge 900"),
        ({"fccd_in_mm": [1, 1, -0.1, 1, 1, 1]}, "row 2: expected fccd_in_mm"),
        ({"fccd_in_mm": [1, 1, np.inf, 1, 1, 1]}, "row 2: expected fccd_in_mm"),
        ({"fccd_in_mm": [1.0]}, "one fccd_in_mm for each of 6"),
        ({"dlf": [0, 0, 0, 0, 0, 1.1]}, "row 5: expected dlf as a number in"),
        ({"dlf": [0, 0, 0, -0.1, 0, 1]}, "row 3: expected dlf as a number in"),
        ({"exposure": 0}, "exposure > 0"),
        ({"exposure": np.nan}, "exposure > 0"),
    ],
)
def test_impossible_spectra_are_refused(change, message):
    with pytest.raises(DataError) as e:
        make(**change)
    assert message in str(e.value)


def test_bad_count_names_its_row(spectra):
    spectra.counts[4, 7] = -3
    with pytest.raises(DataError, match="row 4: .*found -3 in bin 7"):
        spectra.validate()


def test_whole_floats_become_counts():
    assert make(counts=np.full((6, 900), 3.0)).counts.dtype == np.int64


def test_normalise(spectra):
    assert np.allclose(normalise(spectra.counts, "exposure", 2.0) * 2, spectra.counts)
    assert np.allclose(normalise(spectra.counts, "unit").sum(1), 1)
    assert (normalise(spectra.counts, "none", 2.0) == spectra.counts).all()
    for how, exposure in (("max", 1.0), ("exposure", 0.0), ("exposure", np.nan)):
        with pytest.raises(ConfigError):
            normalise(spectra.counts, how, exposure)
    with pytest.raises(DataError, match="row 1"):
        normalise([[1, 2], [0, 0]], "unit")


def test_concatenate_needs_equal_edges_and_exposure(spectra):
    assert len(concatenate([spectra, make(seed=1)])) == 12
    for other in (spectra.rebin(2), spectra.select_energy(5, 450), make(edges_keV=np.arange(901) * 0.5 + 0.1)):
        with pytest.raises(DataError, match="part 1: expected the edges of the first part"):
            concatenate([spectra, other])
    with pytest.raises(DataError, match="part 2: .*exposure"):
        concatenate([spectra, spectra, make(exposure=1.0)])
    with pytest.raises(DataError, match="found none"):
        concatenate([])


# ---- splits


def labels(n=6000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 2, n), rng.uniform(0, 1, n)


@pytest.mark.parametrize("equal", [False, True])
def test_split_fractions_and_coverage(equal):
    fccd, dlf = labels()
    dlf = np.ones_like(dlf) if equal else dlf
    shares = np.array([np.bincount(split_by_block(fccd, dlf, s), minlength=3) for s in range(40)]) / len(fccd)
    assert np.allclose(shares.mean(0), (0.7, 0.1, 0.2), atol=0.006)
    part = split_by_block(fccd, dlf, 3)
    for p in range(3):
        gaps = np.diff(np.sort(np.r_[0, fccd[part == p], 2]))
        assert gaps.max() < 0.25  # no part misses two columns in a row


@pytest.mark.parametrize("equal", [False, True])
def test_blocks_are_not_torn(equal):
    fccd, dlf = labels()
    dlf = np.ones_like(dlf) if equal else dlf
    part = split_by_block(fccd, dlf, 5)
    size = 0.01 if equal else 0.05
    block = np.floor(fccd / size).astype(int) * 100 + np.minimum(np.floor(dlf / 0.1), 9).astype(int)
    parts_in_block = [len(set(part[block == b])) for b in np.unique(block)]
    assert len(parts_in_block) > 150 and set(parts_in_block) == {1}


def test_split_depends_on_seed_not_on_order_or_company():
    fccd, dlf = labels()
    part, order = split_by_block(fccd, dlf, 7), np.random.default_rng(1).permutation(len(fccd))
    assert (part == split_by_block(fccd, dlf, 7)).all() and (part != split_by_block(fccd, dlf, 8)).any()
    assert (part[order] == split_by_block(fccd[order], dlf[order], 7)).all()
    assert (part[:50] == split_by_block(fccd[:50], dlf[:50], 7)).all()


def test_borders_and_ends_of_the_plane():
    # 0.15 / 0.05 is 2.9999999999999996 in floating point; DLF = 1 belongs to the last block
    a = split_by_block([0.15, 0.151, 1.0, 1.001], [0.95, 0.95, 1.0, 0.95], 0)
    assert a[0] == a[1] and a[2] == a[3]
    assert (split_by_block([0.3, 0.301], [0.7, 0.75], 0, (0.1, 0.4, 0.5))[0]
            == split_by_block([0.3, 0.301], [0.7, 0.75], 0, (0.1, 0.4, 0.5))[1])
    assert set(split_by_block(*labels(), 0, (1, 0, 0))) == {0}


def test_split_config_and_bad_settings(spectra):
    assert (SplitConfig(seed=2).split(spectra) == split_by_block(spectra.fccd_in_mm, spectra.dlf, 2)).all()
    for bad in ({"valid": -0.1}, {"test": 0.95}, {"fccd_block_in_mm": 0}, {"dlf_block": 0}, {"dlf_block": 1.5}):
        with pytest.raises(ConfigError, match="split"):
            SplitConfig(**bad).split(spectra)
    with pytest.raises(ConfigError):
        split_by_block([1], [1], 0, (0.5, 0.5))
    with pytest.raises(DataError, match="row 1: expected known FCCD"):
        split_by_block([1, np.nan], [1, 1], 0)


# ---- published layout


def test_folder_round_trip(folder, spectra):
    back = read_folder(folder)
    assert same(back, spectra) and back.provenance["files"] == 6
    assert same(read_spectra(folder), spectra)
    assert read_folder(folder, exposure=3.0).exposure == 3
    one = read_histogram(next(folder.glob("*FCCD*")))
    assert len(one) == 1 and one.exposure == 2


def test_order_does_not_depend_on_names(tmp_path, spectra):
    write_folder(spectra[::-1], tmp_path / "mc")
    assert same(read_folder(tmp_path / "mc"), spectra)


def test_pandas_reads_our_files(folder, spectra):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("tables")
    for row, (fccd, dlf) in enumerate(zip(spectra.fccd_in_mm, spectra.dlf, strict=True)):
        column = pd.read_hdf(folder / NAME.format(fccd, dlf), key="energy_hist")[0]
        assert (column.to_numpy() == spectra.counts[row]).all()


def test_we_read_files_of_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("tables")
    counts = np.arange(900)
    pd.DataFrame(counts).to_hdf(tmp_path / NAME.format(0.5, 0.25), key="energy_hist", mode="w")
    one = read_histogram(tmp_path / NAME.format(0.5, 0.25))
    assert (one.counts[0] == counts).all() and one.exposure == PUBLISHED_EXPOSURE
    assert (one.fccd_in_mm[0], one.dlf[0]) == (0.5, 0.25)


@pytest.mark.parametrize(
    "name, message",
    [
        ("a_FCCD-0.5mm_DLF0.5.h5", "FCCD >= 0"), ("a_FCCD0.5mm_DLF1.01.h5", "DLF in [0, 1]"),
        ("a_FCCD0.5mm_DLF-0.1.h5", "DLF in [0, 1]"), ("a_FCCD1e999mm_DLF0.5.h5", "FCCD >= 0"),
        ("a_FCCDnanmm_DLF0.5.h5", "file name that ends"), ("a_FCCD0.5_DLF0.5.h5", "file name that ends"),
        ("a_FCCD0.5mm.h5", "file name that ends"), ("a_FCCD0.5mm_DLF0.5_copy.h5", "file name that ends"),
        ("a_FCCD0,5mm_DLF0.5.h5", "file name that ends"), ("experimental_data.h5", "file name that ends"),
        ("a_xFCCD0.5mm_DLF0.5.h5", "file name that ends"),
    ],
)
def test_bad_labels_name_the_file(folder, name, message):
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError) as e:
        read_folder(folder)
    assert name in str(e.value) and message in str(e.value)


def test_labels_as_python_writes_them():
    assert parse_labels(NAME.format(4e-05, 1.0)) == (4e-05, 1.0)
    assert parse_labels(NAME.format(2.0, 0)) == (2.0, 0.0)


def test_repeated_labels_are_said(folder, spectra):
    first = next(folder.iterdir())
    (folder / f"again-{first.name}").write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="1 files repeat the FCCD and DLF"):
        assert len(read_folder(folder)) == 7


def damage(path, how):
    if how == "text":
        path.write_text("energy,counts\n")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        with h5py.File(path, "a") as f:
            values = f["energy_hist/block0_values"][()]
            del f["energy_hist/block0_values"]
            if how == "key":
                f.move("energy_hist", "hist")
            elif how == "bins":
                f["energy_hist/block0_values"] = values[:899]
            elif how == "columns":
                f["energy_hist/block0_values"] = np.repeat(values, 2, 1)
            else:
                values = values.astype(type(how))
                values[17] = how
                f["energy_hist/block0_values"] = values


@pytest.mark.parametrize(
    "how, message",
    [
        ("text", "something else"), ("truncated", "a truncated one"), ("empty", "HDF5 file"), ("key", "energy_hist"),
        ("bins", "900 bins, found shape (899, 1)"), ("columns", "one column"), (-1, "found -1 in bin 17"),
        (np.nan, "found nan in bin 17"), (0.5, "found 0.5 in bin 17"),
    ],
)
def test_damaged_file_is_named(folder, how, message):
    victim = sorted(folder.iterdir())[3]
    damage(victim, how)
    for read in (lambda: read_folder(folder), lambda: read_histogram(victim), lambda: read_spectra(victim)):
        with pytest.raises(DataError) as e:
            read()
        assert victim.name in str(e.value)
    with pytest.raises(DataError) as e:
        read_folder(folder)
    assert message in str(e.value)
    with pytest.raises(DataError):
        prepare(folder, folder.parent / "out.h5")
    assert left_behind(folder.parent) == ["mc"]


def test_missing_and_empty_places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for read, path, message in [
        (read_folder, "no", "no such folder"), (read_folder, "a.txt", "a file"), (read_folder, "empty", "found none"),
        (read_spectra, "no.h5", "no such file"), (read_spectra, "empty", "found none"),
        (read_spectra, "a.txt", "found .txt"),
        (read_store, "no.h5", "no such file"), (read_store, "empty", "a folder"), (read_lh5, "no.lh5", "no such file"),
        (read_histogram, "no.h5", "no such file"),
    ]:
        with pytest.raises(DataError) as e:
            read(tmp_path / path)
        assert message in str(e.value) and path in str(e.value)


def test_unknown_layout_lists_what_is_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["waveforms"] = [1]
    with pytest.raises(DataError, match="waveforms"):
        read_spectra(tmp_path / "a.h5")


def test_folder_of_mixed_exposure(folder, tmp_path):
    write_folder(make(seed=3, exposure=5.0), tmp_path / "other")
    for p in (tmp_path / "other").iterdir():
        p.rename(folder / p.name)
    with pytest.raises(DataError, match="exposure of"):
        read_folder(folder)
    assert len(read_folder(folder, exposure=1.0)) == 12


def test_write_folder_refuses_what_does_not_fit(tmp_path, spectra):
    for bad, message in [
        (spectra.rebin(2), "900 bins of 0.5 keV"), (make(edges_keV=np.arange(901.0)), "900 bins of 0.5 keV"),
        (make(fccd_in_mm=[1, 2, np.nan, 1, 1, 1]), "row 2: expected known"),
        (make(fccd_in_mm=np.ones(6), dlf=np.ones(6)), "row 1: expected each FCCD and DLF once"),
    ]:
        with pytest.raises(DataError) as e:
            write_folder(bad, tmp_path / "mc")
        assert message in str(e.value) and left_behind(tmp_path) == []


def test_write_folder_overwrites_only_spectra(folder, tmp_path, spectra):
    with pytest.raises(DataError, match="not taken"):
        write_folder(spectra, folder)
    write_folder(spectra[:2], folder, overwrite=True)
    assert len(read_folder(folder)) == 2 and left_behind(tmp_path) == ["mc"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        write_folder(spectra, folder, overwrite=True)
    assert (folder / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    write_folder(spectra, tmp_path / "empty")
    assert len(read_folder(tmp_path / "empty")) == 6


# ---- store


def test_store_round_trip(tmp_path, spectra):
    path = tmp_path / "sub" / "store.h5"
    write_store(spectra, path)
    back = read_store(path)
    assert same(back, spectra) and back.provenance == spectra.provenance and back.counts.dtype == np.int64
    assert same(read_spectra(path), spectra) and read_spectra(path, exposure=7).exposure == 7
    big = make(counts=np.full((6, 900), 2**40), fccd_in_mm=np.full(6, np.nan))
    write_store(big, path, overwrite=True)
    assert same(read_store(path), big)


def test_store_is_not_replaced_unasked(tmp_path, spectra):
    path = tmp_path / "store.h5"
    write_store(spectra, path)
    before = path.read_bytes()
    for write in (write_store, write_lh5, lambda s, p: prepare(p, p)):
        with pytest.raises(DataError, match="not taken"):
            write(spectra, path)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="found a folder"):
        write_store(spectra, tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "how, message",
    [("version", "version 1, found"), ("format", "format deadlayer-spectra"), ("dataset", "found no dlf"),
     ("content", "checksum"), ("label", "row 0: expected dlf"), ("truncated", "truncated")],
)
def test_damaged_store(tmp_path, spectra, how, message):
    path = tmp_path / "store.h5"
    write_store(spectra, path)
    if how == "truncated":
        damage(path, how)
    else:
        with h5py.File(path, "a") as f:
            if how == "version":
                f.attrs["version"] = 99
            elif how == "format":
                f.attrs["format"] = "other"
            elif how == "dataset":
                del f["dlf"]
            elif how == "content":
                f["fccd_in_mm"][0] = 0.123
            else:
                f["dlf"][0] = 2
    with pytest.raises(DataError) as e:
        read_store(path)
    assert message in str(e.value) and "store.h5" in str(e.value)


# ---- a full disk


WRITERS = {"store": write_store, "lh5": write_lh5, "folder": write_folder}


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_leaves_nothing(tmp_path, spectra, monkeypatch, kind):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5py.Group, "__setitem__", full)
    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(DataError, match="No space left on device.*no part of it was left"):
        WRITERS[kind](spectra, tmp_path / "out.h5")
    assert left_behind(tmp_path) == []


def test_limit_of_the_operating_system(tmp_path):
    pytest.importorskip("resource")
    code = """
        import resource, sys, numpy as np
        from deadlayer_cres.core import DataError
        from deadlayer_cres.deadlayer.data import Spectra, write_folder, write_lh5, write_store
        n = 40
        s = Spectra(np.random.default_rng(0).integers(0, 2**60, (n, 900)), np.arange(901) / 2, np.arange(n), np.ones(n))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        for write in (write_folder, write_lh5, write_store):
            try: write(s, sys.argv[1])
            except DataError as e: print(type(e).__name__, e)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out.h5")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = run.stdout.splitlines()
    assert len(said) == 3 and all("DataError" in t and "out.h5" in t for t in said), (run.stdout, run.stderr)
    assert left_behind(tmp_path) == [] and run.returncode == 0


# ---- LH5


def write_foreign_lh5(path, weights, edges, units="keV", density=False, name="spectrum", **axis):
    with h5py.File(path, "a") as f:
        group = f.create_group(f"hpge/{name}")
        group.attrs["datatype"] = "struct{binning,isdensity,weights}"
        if isinstance(edges, tuple):
            item = group.create_group("binning/axis_0/binedges")
            for key, value in zip(("first", "last", "step"), edges, strict=True):
                item[key] = value
        else:
            group["binning/axis_0/binedges"] = edges
            item = group["binning/axis_0/binedges"]
        if units:
            item.attrs["units"] = units
        group["binning/axis_0/closedleft"], group["isdensity"], group["weights"] = True, density, weights


def test_lh5_round_trip(tmp_path, spectra):
    write_lh5(spectra, tmp_path / "a.lh5")
    back = read_lh5(tmp_path / "a.lh5")
    assert same(back, spectra) and same(read_spectra(tmp_path / "a.lh5"), spectra)
    assert same(read_lh5(tmp_path / "a.lh5", "energy_hist_00003"), spectra[3])
    measured = make(1, fccd_in_mm=[np.nan], dlf=[np.nan], exposure=1.0)
    write_lh5(measured, tmp_path / "b.lh5", key="hist")
    assert same(read_lh5(tmp_path / "b.lh5"), measured)
    with pytest.raises(DataError, match="key of letters"):
        write_lh5(spectra, tmp_path / "c.lh5", key="a/b")


@pytest.mark.parametrize("units, factor", [("keV", 1), ("MeV", 1e3), ("eV", 1e-3), (None, 1)])
def test_lh5_units_and_binning(tmp_path, units, factor):
    write_foreign_lh5(tmp_path / "a.lh5", np.arange(4.0), (0.0, 2.0, 0.5), units)
    assert np.allclose(read_lh5(tmp_path / "a.lh5").edges_keV, np.arange(5) * 0.5 * factor)
    write_foreign_lh5(tmp_path / "b.lh5", np.array([4.0, 3, 2]), np.array([0.0, 1, 2, 4]), units, density=True)
    one = read_lh5(tmp_path / "b.lh5")
    assert one.counts.tolist() == [[4, 3, 4]] and np.isnan(one.dlf[0]) and one.exposure == 1
    assert read_lh5(tmp_path / "b.lh5", exposure=2.0).exposure == 2


def test_lh5_labels_from_the_name(tmp_path):
    write_foreign_lh5(tmp_path / "sim_FCCD0.9mm_DLF0.25.lh5", np.arange(4.0), (0, 2, 0.5))
    one = read_lh5(tmp_path / "sim_FCCD0.9mm_DLF0.25.lh5")
    assert (one.fccd_in_mm[0], one.dlf[0]) == (0.9, 0.25)


@pytest.mark.parametrize(
    "change, message",
    [({"units": "ADC"}, "keV, MeV or eV"), ({"weights": np.ones(5)}, "weights for 4 bins"),
     ({"weights": np.full(4, np.nan)}, "found nan"), ({"weights": np.full(4, 0.5)}, "found 0.5"),
     ({"edges": (0, 2, -0.5)}, "step > 0"),
     ({"edges": (2, 0, 0.5)}, "first < last"), ({"edges": (0, np.inf, 0.5)}, "first < last"),
     ({"edges": np.array([0, 1, 1, 2, 3.0])}, "increase")],
)
def test_bad_lh5(tmp_path, change, message):
    write_foreign_lh5(tmp_path / "a.lh5", **{"weights": np.ones(4), "edges": (0.0, 2.0, 0.5)} | change)
    with pytest.raises(DataError) as e:
        read_lh5(tmp_path / "a.lh5")
    assert message in str(e.value) and "a.lh5" in str(e.value)


def test_incomplete_lh5(tmp_path):
    write_foreign_lh5(tmp_path / "b.lh5", np.ones(4), (0.0, 2.0, 0.5))
    with h5py.File(tmp_path / "b.lh5", "a") as f:
        del f["hpge/spectrum/binning/axis_0/binedges/step"]
    with pytest.raises(DataError, match="no step"):
        read_lh5(tmp_path / "b.lh5")
    write_foreign_lh5(tmp_path / "a.lh5", np.ones(4), (0.0, 2.0, 0.5))
    with pytest.raises(DataError, match="called other, found hpge/spectrum"):
        read_lh5(tmp_path / "a.lh5", "other")
    write_foreign_lh5(tmp_path / "a.lh5", np.ones(4), (0.0, 4.0, 1.0), name="zz")
    with pytest.raises(DataError, match="hpge/zz: expected histograms with the same bins"):
        read_lh5(tmp_path / "a.lh5")
    with h5py.File(tmp_path / "a.lh5", "a") as f:
        del f["hpge/spectrum/weights"]
    with pytest.raises(DataError, match="no weights"):
        read_lh5(tmp_path / "a.lh5", "hpge/spectrum")


def test_lgdo_agrees(tmp_path, spectra):
    lgdo, lh5 = pytest.importorskip("lgdo"), pytest.importorskip("lh5")
    write_lh5(spectra, tmp_path / "ours.lh5")
    for i, name in enumerate(lh5.ls(tmp_path / "ours.lh5")):
        theirs = lh5.read(name, str(tmp_path / "ours.lh5"))
        assert isinstance(theirs, lgdo.Histogram) and not theirs.isdensity
        assert (theirs.weights.nda == spectra.counts[i]).all()
        assert (theirs.binning[0].edges == spectra.edges_keV).all()
        assert theirs.attrs["fccd_in_mm"] == spectra.fccd_in_mm[i]
    edges = [np.array([0.0, 1, 2, 4, 6])], [(0, 2, 0.5)]
    for name, binning in zip("ab", edges, strict=True):
        hist = lgdo.Histogram(np.arange(4.0), binning, isdensity=False, binedge_attrs={"units": "keV"})
        lh5.write(hist, "hist", str(tmp_path / f"{name}.lh5"), wo_mode="of")
        one = read_spectra(tmp_path / f"{name}.lh5")
        assert one.counts.tolist() == [[0, 1, 2, 3]]
        assert np.allclose(one.edges_keV, binning[0] if name == "a" else np.arange(5) * 0.5)


# ---- packing, figures, places


def test_prepare(folder, tmp_path, spectra):
    write_store(make(2, seed=9), tmp_path / "more.h5")
    summary = prepare([folder, tmp_path / "more.h5"], tmp_path / "out.h5", rebin=2)
    packed = read_store(tmp_path / "out.h5")
    assert (packed.counts[:6] == spectra.select_energy(5, 450).rebin(2).counts).all() and packed.exposure == 2
    assert packed.provenance["rebin"] == 2 and packed.provenance["energy_keV"] == [5, 450]
    with pytest.raises(DataError, match="not taken"):  # checked before anything is read
        prepare(tmp_path / "missing", tmp_path / "out.h5")
    assert summary["spectra"] == 8 and summary["bins"] == 445 and summary["checksum"] == packed.checksum
    assert [s["spectra"] for s in summary["sources"]] == [6, 2] and summary["counts"] == packed.counts.sum()
    assert json.loads(json.dumps(summary)) == summary
    assert prepare(str(folder), tmp_path / "out.h5", 0, 450, exposure=4, overwrite=True)["exposure"] == 4


def test_prepare_with_bad_sources(folder, tmp_path):
    write_store(make(2, exposure=1.0), tmp_path / "odd.h5")
    for sources, options, message in [
        ([folder, tmp_path / "odd.h5"], {}, "odd.h5: expected the exposure"), ([], {}, "found none"),
        (folder, {"rebin": 7}, "divides 890"), (folder, {"low_keV": 900, "high_keV": 950}, "energy range"),
        ([folder, tmp_path / "no.h5"], {}, "no such file"),
    ]:
        with pytest.raises(InputError) as e:
            prepare(sources, tmp_path / "out.h5", **options)
        assert message in str(e.value) and left_behind(tmp_path) == ["mc", "odd.h5"]


def test_figures(spectra):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = plot_labels(spectra)
    assert len(figure.axes) == 3 and figure.axes[2].get_xlabel() == "FCCD (mm)"
    ax = plot_spectra(spectra[:2], "unit")
    assert ax.get_yscale() == "log" and len(ax.get_legend().get_texts()) == 2
    plt.close("all")


def test_place_of_the_data(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "repo" / "nbs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "repo" / "nbs")
    monkeypatch.delenv("DEADLAYER_CRES_DATA", raising=False)
    assert shared_data() == tmp_path / "shared" / "data"
    monkeypatch.setenv("DEADLAYER_CRES_DATA", str(tmp_path))
    assert shared_data() == tmp_path
    monkeypatch.setenv("DEADLAYER_CRES_DATA", str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="DEADLAYER_CRES_DATA"):
        shared_data()


# ---- the published spectra


def test_published_spectra(published, tmp_path):
    start = time.process_time()
    sets = {d: read_folder(published / f"training_data_V05268A_5000randomFCCDs_{d}") for d in ("DLF1", "randomDLFs")}
    assert time.process_time() - start < 20  # 9,099 files take about 5 s of processor time
    assert len(sets["DLF1"]) == 4591 and len(sets["randomDLFs"]) == 4508
    assert (sets["DLF1"].dlf == 1).all() and np.unique(sets["randomDLFs"].dlf).size > 1000
    for s in sets.values():
        assert s.counts.shape[1] == 900 and s.exposure == pytest.approx(2.8711, abs=1e-4)
        assert (s.fccd_in_mm >= 0).all() and (s.fccd_in_mm <= 2).all() and s.provenance["duplicates"] == 0
        assert (np.diff(s.fccd_in_mm) >= 0).all()
        part = SplitConfig().split(s)
        assert np.allclose(np.bincount(part) / len(s), (0.7, 0.1, 0.2), atol=0.02)
        for p in range(3):
            assert np.diff(np.sort(s.fccd_in_mm[part == p])).max() < 0.2
    write_store(sets["randomDLFs"], tmp_path / "s.h5")
    assert same(read_store(tmp_path / "s.h5"), sets["randomDLFs"])


def test_measured_spectrum(published):
    measured = read_spectra(published / "experimental_data_V05268A.h5")
    assert measured.counts.sum() == 1_848_070 and measured.exposure == 1
    assert np.isnan(measured.fccd_in_mm[0]) and np.isnan(measured.dlf[0])
    assert (measured.counts[0, measured.edges_keV[1:] <= 4] == 0).all()


def test_parent_folder_says_what_is_wrong(published):
    with pytest.raises(DataError, match="experimental_data_V05268A.h5.*file name that ends"):
        read_folder(published)


def test_unreadable_file(folder):
    victim = next(folder.iterdir())
    victim.chmod(0)
    if os.access(victim, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match="permission"):
        read_folder(folder)


def test_module_lists_its_names():
    assert {"Spectra", "read_spectra", "split_by_block", "prepare"} <= set(data.__all__)
