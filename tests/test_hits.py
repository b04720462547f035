"""Hits of other simulations, and spectra on a whole grid of FCCD and DLF."""

import h5py
import numpy as np
import pytest

from deadlayer_cres.cli import deadlayer
from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer.data import Spectra, read_store
from deadlayer_cres.deadlayer.detector import exponential_linear_activeness
from deadlayer_cres.deadlayer.simulate import (
    Hits,
    background,
    contaminate,
    exponential_linear,
    grid_spectra,
    measured_energies,
    pile_up,
    read_hits_lh5,
    simulate_hits,
    spectra_of_hits,
    spectrum,
)


@pytest.fixture(scope="module")
def hits():
    return simulate_hits(150_000, seed=3)


def write_flat(path, hits, energy=("keV", 1.0), length=("mm", 1.0), table="stp/det001", **names):
    "Hits as remage writes them: one row a hit."
    with h5py.File(path, "w") as f:
        group = f.create_group(table)
        group.attrs["datatype"] = "table{evtid,edep,distance_to_nplus}"
        columns = {"evtid": (hits.event, None), "edep": (hits.edep_keV.astype(float) * energy[1], energy[0]),
                   "distance_to_nplus": (hits.distance_to_nplus_mm.astype(float) * length[1], length[0])}
        for name, (values, unit) in columns.items():
            item = group.create_dataset(names.get(name, name), data=values)
            item.attrs["datatype"] = "array<1>{real}"
            if unit:
                item.attrs["units"] = unit


def write_jagged(path, hits, units=("keV", "mm")):
    "Hits as reboost writes them: one row an event, vectors of vectors."
    lengths = np.bincount(hits.event, minlength=hits.decays)
    with h5py.File(path, "w") as f:
        group = f.create_group("hit/det001")
        group.attrs["datatype"] = "table{edep,distance_to_nplus}"
        for name, values, unit in zip(("edep", "distance_to_nplus"), (hits.edep_keV, hits.distance_to_nplus_mm), units,
                                      strict=True):
            column = group.create_group(name)
            column.attrs["datatype"] = "array<1>{array<1>{real}}"
            column["cumulative_length"], column["flattened_data"] = np.cumsum(lengths), values
            column["cumulative_length"].attrs["datatype"] = "array<1>{real}"
            column["flattened_data"].attrs.update({"datatype": "array<1>{real}", "units": unit})


def same(a, b):
    return (np.array_equal(a.event, b.event) and np.allclose(a.edep_keV, b.edep_keV)
            and np.allclose(a.distance_to_nplus_mm, b.distance_to_nplus_mm, equal_nan=True) and a.decays == b.decays)


@pytest.mark.parametrize("energy, length", [(("keV", 1), ("mm", 1)), (("MeV", 1e-3), ("cm", 0.1)),
                                            ((None, 1), (None, 1)), (("eV", 1e3), ("um", 1e3)),
                                            (("GeV", 1e-6), ("m", 1e-3))])
def test_flat_hits_in_any_unit(tmp_path, hits, energy, length):
    write_flat(tmp_path / "a.lh5", hits, energy, length)
    assert same(read_hits_lh5(tmp_path / "a.lh5", hits.decays), hits)


def test_jagged_and_padded_hits(tmp_path, hits):
    write_jagged(tmp_path / "a.lh5", hits)
    found = read_hits_lh5(tmp_path / "a.lh5", hits.decays)
    assert same(found, hits) and found.provenance["table"] == "/hit/det001"
    with h5py.File(tmp_path / "b.lh5", "w") as f:
        f["edep"], f["distance_to_nplus"] = [[5.0, 6], [7, np.nan]], [[1.0, 2], [3, np.nan]]
    found = read_hits_lh5(tmp_path / "b.lh5", 2)
    assert found.event.tolist() == [0, 0, 1] and found.edep_keV.tolist() == [5, 6, 7]


def test_rows_in_any_order(tmp_path):
    mixed = Hits([0, 0, 1, 3], [1, 2, 3, 4], [1, 1, 1, 1], 5)
    write_flat(tmp_path / "a.lh5", mixed)
    with h5py.File(tmp_path / "a.lh5", "r+") as f:
        for name in ("evtid", "edep", "distance_to_nplus"):
            f["stp/det001"][name][...] = f["stp/det001"][name][()][[3, 0, 2, 1]]
    found = read_hits_lh5(tmp_path / "a.lh5", 5)
    assert found.event.tolist() == [0, 0, 1, 3] and found.edep_keV.tolist() == [1, 2, 3, 4]


def test_other_names_and_several_tables(tmp_path, hits):
    write_flat(tmp_path / "a.lh5", hits, distance_to_nplus="dist_to_surf", evtid="event")
    with pytest.raises(DataError, match="names of the columns"):
        read_hits_lh5(tmp_path / "a.lh5", hits.decays)
    found = read_hits_lh5(tmp_path / "a.lh5", hits.decays, distance="dist_to_surf", event="event")
    assert same(found, hits)
    write_flat(tmp_path / "b.lh5", hits, table="stp/det001")
    with h5py.File(tmp_path / "b.lh5", "r+") as f:
        f.copy("stp/det001", "stp/det002")
    with pytest.raises(DataError, match="det002"):
        read_hits_lh5(tmp_path / "b.lh5", hits.decays)
    assert same(read_hits_lh5(tmp_path / "b.lh5", hits.decays, table="/stp/det002"), hits)
    with pytest.raises(DataError, match="det003"):
        read_hits_lh5(tmp_path / "b.lh5", hits.decays, table="det003")


def damage(what, f):
    "Spoil a file of hits."
    group = f["hit/det001"] if "hit" in f else f["stp/det001"]
    if what == "unit":
        group["edep"].attrs["units"] = "furlong"
    elif what == "no event":
        del group["evtid"]
    elif what == "short":
        del group["edep"]
        group["edep"] = [1.0, 2.0]
    elif what == "negative":
        group["edep"][0] = -1.0
    elif what == "rows":
        group["edep/cumulative_length"][0] += 1
        group["edep/cumulative_length"][1] += 1
    elif what == "ends":
        group["edep/cumulative_length"][-1] += 1
    elif what == "nested":
        del group["edep/flattened_data"]
        group.create_group("edep/flattened_data")


@pytest.mark.parametrize("kind, what", [("flat", "unit"), ("flat", "no event"), ("flat", "short"), ("flat", "negative"),
                                        ("jagged", "rows"), ("jagged", "ends"), ("jagged", "nested")])
def test_damaged_hits_are_refused(tmp_path, kind, what):
    few = Hits([0, 0, 1, 3], [1, 2, 3, 4], [1, 1, 1, 1], 5)
    (write_flat if kind == "flat" else write_jagged)(tmp_path / "a.lh5", few)
    with h5py.File(tmp_path / "a.lh5", "r+") as f:
        damage(what, f)
    with pytest.raises(DataError, match="a.lh5"):
        read_hits_lh5(tmp_path / "a.lh5", 5)


def test_unreadable_hits_are_refused(tmp_path):
    few = Hits([0, 4], [1, 2], [1, 1], 5)
    write_flat(tmp_path / "a.lh5", few)
    with pytest.raises(DataError):
        read_hits_lh5(tmp_path / "a.lh5", 3)  # fewer decays than the file has
    (tmp_path / "b.lh5").write_text("no")
    for name in ("b.lh5", "missing.lh5"):
        with pytest.raises(DataError):
            read_hits_lh5(tmp_path / name, 5)


@pytest.mark.parametrize("kwargs", [{}, {"fwhm": None}, {"threshold_keV": 20.0}, {"seed": 4},
                                    {"edges_keV": np.arange(10, 300.5, 2.0)}])
def test_grid_is_the_spectra_one_by_one(hits, kwargs):
    fccd = np.array([0.0, 0.0, 0.3, 1.0, 1.0, 1.0, 1.7, 2.0])
    dlf = np.array([0.0, 1.0, 0.5, 0.0, 0.4, 1.0, 0.9, 0.1])
    one = np.array([spectrum(hits, f, d, **kwargs) for f, d in zip(fccd, dlf, strict=True)])
    assert np.abs(grid_spectra(hits, fccd, dlf, **kwargs) - one).sum() <= 2


def test_grid_in_pieces_and_with_other_activeness(hits, monkeypatch):
    fccd, dlf = (g.ravel() for g in np.meshgrid(np.linspace(0, 2, 17), np.linspace(0, 1, 10)))
    whole = grid_spectra(hits, fccd, dlf)
    monkeypatch.setattr("deadlayer_cres.deadlayer.simulate.CELLS", 1 << 13)
    assert np.array_equal(grid_spectra(hits, fccd, dlf), whole)
    fccd, dlf = np.array([0.6, 1.0, 1.4]), np.array([0.1, 0.3, 0.6])
    soft = grid_spectra(hits, fccd, dlf, activeness=exponential_linear(0.2))
    for f, d, counts in zip(fccd, dlf, soft, strict=True):
        assert np.array_equal(counts, spectrum(hits, f, d, activeness=exponential_linear(0.2)))
    near = grid_spectra(hits, fccd, dlf, activeness=exponential_linear(1e-9))
    assert np.abs(near - grid_spectra(hits, fccd, dlf)).sum() <= 4


def test_grid_takes_odd_hits_and_refuses_nonsense(hits):
    h = Hits([0, 0, 2, 3, 3], [80, 20, 50, 30, 10], [0.75, 5, 0.25, 2, np.nan], 5)
    one = np.array([spectrum(h, f, d, fwhm=None) for f, d in ((1.0, 0.5), (0.0, 1.0), (2.0, 0.0))])
    assert np.array_equal(grid_spectra(h, [1.0, 0.0, 2.0], [0.5, 1.0, 0.0], fwhm=None), one)
    none = Hits([], [], [], 5)
    assert grid_spectra(none, [1.0, 2.0], 0.5).sum() == 0
    deep = Hits([0, 1], [60, 70], [9, 9], 5)
    assert grid_spectra(deep, [1.0, 2.0], 0.5, fwhm=None).sum(1).tolist() == [2, 2]
    for kwargs in ({"fccd_in_mm": [-1.0]}, {"dlf": [2.0]}, {"edges_keV": [0, 1, 3]}, {"activeness": "cubic"}):
        with pytest.raises(ConfigError):
            grid_spectra(h, **({"fccd_in_mm": [1.0], "dlf": [0.5]} | kwargs))


def test_exponential_linear_broadcasts():
    depth = np.linspace(0, 1.5, 40)
    fccd, alpha, beta = np.array([[[1.0], [1.2], [0.8]], [[0.8], [0.5], [0.3]], [[0.3], [0.0], [0.1]]])
    both = exponential_linear_activeness(depth[None], fccd, alpha, beta)
    for row, f, a, b in zip(both, fccd[:, 0], alpha[:, 0], beta[:, 0], strict=True):
        assert np.allclose(row, exponential_linear_activeness(depth, f, a, b))
    with pytest.raises(ConfigError, match="alpha"):
        exponential_linear_activeness(depth[None], fccd, alpha, 3.0)


def test_activeness_and_energies_agree_with_reboost(hits):
    math = pytest.importorskip("reboost.math", reason="reboost is not installed (pip install reboost)")
    ak = pytest.importorskip("awkward")
    depth, lengths = hits.distance_to_nplus_mm, np.bincount(hits.index)
    for fccd, dlf in ((1.0, 0.5), (0.7, 1.0), (1.5, 0.0)):
        share = np.asarray(math.piecewise_linear_activeness(depth.astype(float), fccd, dlf))
        theirs = ak.sum(ak.unflatten(share * hits.edep_keV, lengths), axis=-1).to_numpy()
        ours = measured_energies(hits, fccd, dlf, fwhm=None)
        assert np.allclose(np.nan_to_num(ours), theirs, atol=1e-3)


def test_background_by_hand():
    edges = np.array([0.0, 1.0, 3.0])
    assert background(edges, 2.0).tolist() == [2, 4]
    assert background(edges, 0, 5.0, 10.0)[0] == pytest.approx(50 * (1 - np.exp(-0.1)))
    for bad in ((-1, 0, 1), (0, -1, 1), (0, 0, 0), (np.nan, 0, 1)):
        with pytest.raises(ConfigError):
            background(edges, *bad)


def test_pile_up_by_hand():
    counts = np.zeros(20)
    counts[4], counts[9] = 30, 10
    left, sums = pile_up(counts, np.arange(21.0), 0.1)
    assert left == pytest.approx(0.8) and sums.sum() == pytest.approx(0.1 * 40)
    share = {8: 900, 13: 600, 18: 100}
    expected = np.zeros(21)
    for k, v in share.items():
        expected[[k, k + 1]] += v / 2
    assert np.allclose(sums, 0.1 * expected[:20] / 40)
    later = pile_up(counts[2:], np.arange(2, 21.0), 0.1)[1]
    assert np.allclose(later, sums[2:])
    for bad in ((np.arange(21.0) + 0.3, 0.1), (np.arange(21.0), 0.6), (np.arange(21.0), -0.1)):
        with pytest.raises(ConfigError):
            pile_up(counts, *bad)


def test_contaminated_spectra(hits):
    clean = spectra_of_hits(hits, [1.0], [0.5])
    bright = Spectra(clean.counts * 1000, clean.edges_keV, clean.fccd_in_mm, clean.dlf, 2.0)
    dirty = contaminate(bright, 1, flat_per_keV=100.0, pile_up_probability=0.02)
    n = bright.counts.sum()
    assert dirty.counts[0, 890:].sum() > 0.9 * 100 * 5 * 2
    share = clean.counts[0] / clean.counts.sum()
    seen = np.convolve(share, share)[:899].sum()  # of the sums of two decays, those that are not above the last bin
    expected = n * (1 - 0.04) + 100 * 450 * 2 + 0.02 * n * seen
    assert dirty.counts.sum() == pytest.approx(expected, rel=0.001) and 0.3 < seen < 0.95
    assert np.array_equal(contaminate(bright, 1).counts, bright.counts)
    assert dirty.provenance["contaminated"]["pile_up"] == 0.02


def test_command_line_makes_a_store_of_hits(tmp_path, hits, capsys):
    write_flat(tmp_path / "a.lh5", hits, ("MeV", 1e-3))
    common = ["simulate", "--random", "3", "--dlf1", "1", "--out", str(tmp_path / "mc.h5")]
    deadlayer([*common, "--hits", str(tmp_path / "a.lh5"), "--decays", str(hits.decays)])
    s = read_store(tmp_path / "mc.h5")
    assert len(s) == 4 and s.dlf[3] == 1 and s.provenance["decays"] == hits.decays
    assert np.array_equal(s.counts[3], spectrum(hits, s.fccd_in_mm[3], 1.0))
    for wrong in (["--hits", str(tmp_path / "a.lh5")], ["--decays", "9", "--hits", str(tmp_path / "no.lh5")],
                  ["--hits", str(tmp_path / "a.lh5"), "--decays", "150000", "--surroundings"]):
        with pytest.raises(SystemExit) as e:
            deadlayer([*common, "--overwrite", *wrong])
        assert e.value.code == 2
    capsys.readouterr()


def test_command_line_takes_other_geometries(tmp_path, capsys):
    import json

    from test_surroundings import meta

    (tmp_path / "v.json").write_text(json.dumps(meta()))
    (tmp_path / "s.yaml").write_text("source_to_endcap_mm: 60\ncrystal: {radius_mm: 35}\n"
                                     "surroundings: {castle_top_mm: 0}\n")
    common = ["simulate", "--random", "1", "--dlf1", "1", "--decays", "2000", "--overwrite",
              "--out", str(tmp_path / "mc.h5")]
    deadlayer([*common, "--detector", str(tmp_path / "v.json"), "--fwhm_a", "4"])
    assert "0.75 mm" in capsys.readouterr().out
    setup = read_store(tmp_path / "mc.h5").provenance["setup"]
    assert setup["crystal"]["top_taper_height_mm"] == 60 and setup["surroundings"] is None
    deadlayer([*common, "--setup", str(tmp_path / "s.yaml"), "--flat_per_keV", "1000", "--pile_up", "0.01"])
    setup = read_store(tmp_path / "mc.h5").provenance["setup"]
    assert setup["source_to_endcap_mm"] == 60 and setup["surroundings"]["castle_top_mm"] == 0
    (tmp_path / "bad.yaml").write_text("sauce_to_endcap_mm: 60\n")
    for wrong in (["--setup", str(tmp_path / "bad.yaml")], ["--setup", "none.yaml"], ["--detector", "none.yaml"],
                  ["--surroundings", "--setup", str(tmp_path / "s.yaml")], ["--fwhm_a", "-1"]):
        with pytest.raises(SystemExit) as e:
            deadlayer([*common, *wrong])
        assert e.value.code == 2
