"""CRES data: the store and its writer, every format in and out, bad input, preparing, and batches."""
import base64
import codecs
import copyreg
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from deadlayer_cres.core import ConfigError, DataError, InputError
from deadlayer_cres.cres import data as module
from deadlayer_cres.cres.data import (
    COLUMNS,
    LO_FREQUENCY_HZ,
    SAMPLING_RATE_HZ,
    UNSET,
    BlockBatches,
    EventBatches,
    Events,
    EventStore,
    PrepareConfig,
    ShardWriter,
    SplitConfig,
    concatenate,
    cut_windows,
    egg_info,
    event_lots,
    merge_stores,
    prepare,
    read_egg,
    read_events,
    read_phyts,
    read_pickle,
    read_store,
    read_truth,
    shared_data,
    trapped,
    write_seed_hdf5,
    write_store,
)


def make_events(n=10, samples=64, seed=0, noise=()) -> Events:
    rng = np.random.default_rng(seed)
    columns = {k: rng.uniform(1, 2, n) for k in COLUMNS}
    columns["pitch_angle_deg"] = rng.uniform(88, 90, n)
    columns["energy_eV"] = rng.uniform(18500, 18700, n)
    columns["start_carrier_frequency_Hz"] = rng.uniform(25.899e9, 25.925e9, n)
    recorded = {k: rng.standard_normal((n, 2, samples)) for k in noise}
    return Events(rng.standard_normal((n, 2, samples)), columns, noise=recorded, provenance={"seed": seed})


def same(a: Events, b: Events, columns=True) -> bool:
    return (np.array_equal(a.ts, b.ts) and set(a.noise) == set(b.noise)
            and all(np.array_equal(a.noise[k], b.noise[k]) for k in a.noise)
            and (a.sampling_rate_Hz, a.lo_frequency_Hz) == (b.sampling_rate_Hz, b.lo_frequency_Hz)
            and (not columns or a.columns.keys() == b.columns.keys()
                 and all(np.array_equal(a.columns[k], b.columns[k], equal_nan=True) for k in a.columns)))


def fails(match, function, *args, error=DataError, **kwargs) -> InputError:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert match in str(caught.value), f"{match!r} not in {caught.value}"
    return caught.value


# --- events ---

def test_events_index_and_check_shapes():
    e = make_events(5, noise=["cav"])
    assert len(e[2]) == 1 and same(e[2], e[2:3]) and same(e[-1], e[4:]) and len(e[e.columns["energy_eV"] > 0]) == 5
    assert e.ts.dtype == np.float32 and e.columns["energy_eV"].dtype == np.float64 and e.samples == 64
    assert e[:2].noise["cav"].shape == (2, 2, 64)
    assert len(Events(None, {"a": [1, 2]})) == 2 and len(Events(None)) == 0
    fails("shape (5, 3, 4)", Events, np.zeros((5, 3, 4)))
    fails("one energy_eV for each of 5", Events, np.zeros((5, 2, 4)), {"energy_eV": np.zeros(4)})
    fails("noise of the shape", Events, np.zeros((5, 2, 4)), noise={"cav": np.zeros((5, 2, 3))})
    fails("sampling_rate_Hz", Events, np.zeros((5, 2, 4)), sampling_rate_Hz=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_events_name_the_sample_that_is_not_finite(value):
    e = make_events(5, noise=["cav"])
    e.ts[3, 1, 17] = value
    error = fails("in ts at Q sample 17", e.validate)
    assert error.row == 3
    e = make_events(5, noise=["cav"])
    e.noise["cav"][2, 0, 1] = value
    assert fails("cav noise at I sample 1", e.validate).row == 2
    e = make_events(5)
    e.columns["radius_m"][4] = np.inf
    assert fails("radius_m finite", e.validate).row == 4


def test_concatenate_keeps_common_labels_and_names_what_does_not_fit():
    a, b = make_events(3), make_events(4, seed=1)
    b.columns["extra"] = np.zeros(4)
    both = concatenate([a, b])
    assert len(both) == 7 and "extra" not in both.columns and np.array_equal(both.ts[3:], b.ts)
    assert fails("samples 64", concatenate, [a, make_events(2, 32)]).row == "set 1"
    fails("sampling_rate_Hz", concatenate, [a, Events(b.ts, b.columns, 200e6)])
    fails("noise []", concatenate, [a, make_events(2, noise=["cav"])])
    fails("none", concatenate, [])


# --- the store ---

@pytest.mark.parametrize("name", ["one.h5", "folder"])
def test_store_round_trip(tmp_path, name):
    e = make_events(23, noise=["cav", "gauss"])
    write_store(e, tmp_path / name, shard_events=7)
    assert same(read_store(tmp_path / name), e)
    assert same(read_events(tmp_path / name), e)
    store = EventStore(tmp_path / name)
    assert list(store.columns) == list(COLUMNS) and store.noise == ("cav", "gauss") and len(store) == 23
    rows = [22, 0, 8, 8, 7, 6, 13]
    wanted = Events(e.ts[rows], e[rows].columns, noise={"gauss": e.noise["gauss"][rows]})
    assert same(store.read(rows, noise=["gauss"]), wanted)
    assert np.array_equal(store.read(slice(5, 9), samples=10).ts, e.ts[5:9, :, :10])
    mask = np.arange(23) % 5 == 0
    assert np.array_equal(store.read(mask).ts, e.ts[mask])
    assert len(store.read([])) == 0
    fails("at most 64 samples", store.read, [0], 65, error=ConfigError)
    fails("'thermal'", store.read, [0], noise=["thermal"], error=ConfigError)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read([3]).ts, e.ts[[3]])


def test_store_attributes_and_layout(tmp_path):
    e = make_events(5)
    e.provenance = {"long": "x" * 200_000}
    e.sampling_rate_Hz = 200e6
    write_store(e, tmp_path / "s", shard_events=2)
    index = json.loads((tmp_path / "s/index.json").read_text())
    assert [s["name"] for s in index["shards"]] == ["shard_00000.h5", "shard_00001.h5", "shard_00002.h5"]
    assert index["events"] == 5 and index["sampling_rate_Hz"] == 200e6 and index["columns"] == list(COLUMNS)
    with h5py.File(tmp_path / "s/shard_00001.h5") as f:
        assert f["output_ts_I"].shape == (2, 64) and f["output_ts_I"].dtype == np.float32
        assert f["output_ts_Q"].chunks == (1, 64) and f["energy_eV"].dtype == np.float64
        assert f.attrs["format"] == module.FORMAT and f.attrs["version"] == 1
        assert json.loads(f.attrs["provenance"])["long"] == "x" * 200_000


def test_store_refuses_to_overwrite(tmp_path):
    e, other = make_events(4), make_events(4, seed=1)
    for name in ("s", "s.h5"):
        write_store(e, tmp_path / name)
        fails("not taken", write_store, other, tmp_path / name)
        assert same(read_store(tmp_path / name), e)
        write_store(other, tmp_path / name, overwrite=True)
        assert same(read_store(tmp_path / name), other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    fails("a folder of something else", write_store, e, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.tex").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "s", "s.h5"]
    fails("at least one event", write_store, e[:0], tmp_path / "none")


def test_nothing_is_written_where_a_sample_is_bad(tmp_path):
    e = make_events(9)
    e.ts[7, 0, 3] = np.nan
    assert fails("finite samples", write_store, e, tmp_path / "s.h5").row == 7
    assert not list(tmp_path.iterdir())


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def broken(path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_write_file", broken)
    writer = ShardWriter(tmp_path / "s", {})
    fails("No space left", writer.write, 0, make_events(2))
    assert [p.name for p in writer.work.iterdir()] == ["job.json"] and writer.missing(1) == [0]


def test_writer_resumes_its_own_job_only(tmp_path):
    a, b = make_events(3), make_events(5, seed=1)
    (tmp_path / "s.part").mkdir()
    (tmp_path / "s.part/.job.json.abc.part").write_text("killed while this was written")
    ShardWriter(tmp_path / "s", {"seed": 1}).write(0, a)
    (tmp_path / "s.part/.shard_00001.h5.abc.part").write_text("torn")
    fails("an unfinished one", EventStore, tmp_path / "s.part")
    fails("of other inputs or settings", ShardWriter, tmp_path / "s", {"seed": 2})
    writer = pickle.loads(pickle.dumps(ShardWriter(tmp_path / "s", {"seed": 1})))
    assert writer.missing(3) == [1, 2] and not list((tmp_path / "s.part").glob(".*"))
    fails("shard 1 missing", writer.finish, 3)
    writer.write(2, b)
    writer.write(1, Events(None))
    index = writer.finish(3)
    assert index["events"] == 8 and [s["events"] for s in index["shards"]] == [3, 5]
    assert same(read_store(tmp_path / "s"), concatenate([a, b])) and not (tmp_path / "s.part").exists()
    fails("not taken", ShardWriter, tmp_path / "s", {"seed": 1})
    ShardWriter(tmp_path / "s", {"seed": 3}, overwrite=True).write(0, b)
    assert same(read_store(tmp_path / "s"), concatenate([a, b]))  # until the new one is finished
    (tmp_path / "t.part").mkdir()
    (tmp_path / "t.part/notes.txt").write_text("x")
    fails("a folder of something else", ShardWriter, tmp_path / "t", {}, True)
    fails("a folder for the shards", ShardWriter, tmp_path / "s.h5", {}, error=ConfigError)


def test_writer_survives_a_kill_between_its_last_steps(tmp_path, monkeypatch):
    write_store(make_events(2), tmp_path / "s")
    writer = ShardWriter(tmp_path / "s", {"seed": 1}, overwrite=True)
    writer.write(0, make_events(3, seed=1))
    real = os.replace

    def killed(source, target):
        if Path(source) == writer.work:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.finish(1)
    monkeypatch.undo()
    assert not (tmp_path / "s").exists()
    ShardWriter(tmp_path / "s", {"seed": 1}, overwrite=True).finish(1)
    assert len(read_store(tmp_path / "s")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_writer_finds_shards_that_do_not_fit(tmp_path):
    writer = ShardWriter(tmp_path / "s", {})
    writer.write(0, make_events(3))
    writer.write(1, make_events(3, samples=32))
    assert fails("samples 64 as in shard_00000.h5", writer.finish, 2).path.name == "shard_00001.h5"
    assert not (tmp_path / "s").exists()


def test_damaged_stores_are_named(tmp_path):
    write_store(make_events(8), tmp_path / "s", shard_events=4)
    shard = tmp_path / "s/shard_00001.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole) // 2])
    assert fails("truncated", EventStore, tmp_path / "s").path == shard
    shard.write_bytes(b"hello")
    fails("an HDF5 file", EventStore, tmp_path / "s")
    shard.unlink()
    fails("no such file", EventStore, tmp_path / "s")
    shard.write_bytes(whole)
    with h5py.File(shard, "a") as f:
        f.attrs["version"] = 2
    fails("version 2", EventStore, tmp_path / "s")
    with h5py.File(shard, "a") as f:
        f.attrs["version"] = 1
        del f["output_ts_Q"]
    fails("no output_ts_Q", EventStore, tmp_path / "s")
    shard.write_bytes(whole)
    with h5py.File(shard, "a") as f:
        del f["radius_m"]
        f["radius_m"] = np.zeros(3)
    assert fails("4 values", EventStore, tmp_path / "s").row == "radius_m"
    fails("neither", EventStore, tmp_path)
    fails("no such file", EventStore, tmp_path / "gone")


@pytest.mark.parametrize("index", [[], {}, {"shards": None}, {"shards": [1]}, {"shards": "ab"}, {"shards": [{}]},
                                   {"shards": [{"name": 5}]}])
def test_stores_with_an_odd_index_are_named(tmp_path, index):
    write_store(make_events(4), tmp_path / "s")
    head = {"format": module.FORMAT, "version": module.VERSION}
    (tmp_path / "s/index.json").write_text(json.dumps(head | index if isinstance(index, dict) else index))
    for read in (EventStore, read_events, read_store):
        assert fails("", read, tmp_path / "s").path == tmp_path / "s/index.json"


@pytest.mark.parametrize("name, value", [("provenance", "{bad"), ("provenance", 5), ("sampling_rate_Hz", "fast"),
                                         ("lo_frequency_Hz", [1.0, 2.0]), ("format", b"\xff\xfe"), ("version", [1, 2])])
def test_stores_with_odd_attributes_are_named(tmp_path, name, value):
    write_store(make_events(4), tmp_path / "s")
    shard = tmp_path / "s/shard_00000.h5"
    with h5py.File(shard, "a") as f:
        f.attrs[name] = value
    for call in (lambda: read_events(tmp_path / "s"), lambda: merge_stores([tmp_path / "s"], tmp_path / "m"),
                 lambda: prepare(tmp_path / "s", tmp_path / "p", show_progress=False)):
        assert fails("", call).path.name == shard.name


def test_rows_that_a_store_does_not_have_are_named(tmp_path):
    write_store(make_events(4), tmp_path / "s.h5")
    for rows in ([99], [-5], np.ones(5, bool), 4):
        assert fails("rows of the 4 events", EventStore(tmp_path / "s.h5").read, rows).path == tmp_path / "s.h5"


def test_merged_stores_keep_order_and_originals(tmp_path):
    parts = [make_events(5, seed=k) for k in range(3)]
    for k, part in enumerate(parts):
        write_store(part, tmp_path / f"s{k}", shard_events=2)
    index = merge_stores([tmp_path / f"s{k}" for k in range(3)], tmp_path / "all")
    assert index["events"] == 15 and same(read_store(tmp_path / "all"), concatenate(parts))
    assert same(read_store([tmp_path / "s0", tmp_path / "s2"]), concatenate([parts[0], parts[2]]))
    assert same(read_store(tmp_path / "s1"), parts[1])
    write_store(make_events(3, samples=32), tmp_path / "short")
    fails("samples", merge_stores, [tmp_path / "s0", tmp_path / "short"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# --- seed and benchmark HDF5 ---

def test_seed_layout_is_float32_under_the_common_names(tmp_path):
    e = make_events(300, noise=["cav"])
    write_seed_hdf5(e, tmp_path / "seed.hdf5")
    with h5py.File(tmp_path / "seed.hdf5") as f:
        assert set(f) == {*COLUMNS, "output_ts_I", "output_ts_Q", "output_ts_I_cav_noise", "output_ts_Q_cav_noise"}
        assert {d.dtype for d in f.values()} == {np.dtype(np.float32)} and f["output_ts_I"].shape == (300, 64)
    back = read_phyts(tmp_path / "seed.hdf5")
    assert same(back, e, columns=False)
    assert np.array_equal(back.columns["energy_eV"], e.columns["energy_eV"].astype(np.float32))
    write_store(e, tmp_path / "store", shard_events=70)
    write_seed_hdf5(EventStore(tmp_path / "store"), tmp_path / "again.hdf5")
    assert same(read_phyts(tmp_path / "again.hdf5"), back)
    fails("not taken", write_seed_hdf5, e, tmp_path / "seed.hdf5")


def write_phyts(path, n, samples=128, seed=0, **extra):
    e = make_events(n, samples, seed, ["cav", "gauss"])
    with h5py.File(path, "w") as f:
        for k, v in e.columns.items():
            f[k] = v.astype(np.float32)[:, None] if k == "radius_m" else v.astype(np.float32)
        for noise, values in {None: e.ts, **e.noise}.items():
            for c, name in enumerate(module._ts_names(noise)):
                f[name] = values[:, c]
        for k, v in extra.items():
            f[k] = v
    return e


def test_benchmark_folder_is_read_as_it_is_and_in_parts(tmp_path):
    (tmp_path / "train").mkdir()
    parts = [write_phyts(tmp_path / f"train/part{k}.hdf5", 6, seed=k, filename=np.array([b"x"] * 6)) for k in range(2)]
    store = EventStore(tmp_path / "train")
    assert len(store) == 12 and store.noise == ("cav", "gauss") and store.sampling_rate_Hz == SAMPLING_RATE_HZ
    assert list(store.columns) == list(COLUMNS)  # the names are text and no label
    got = store.read([1, 7, 11], samples=100, noise=["cav"])
    both = concatenate(parts)
    assert np.array_equal(got.ts, both.ts[[1, 7, 11], :, :100])
    assert np.array_equal(got.noise["cav"], both.noise["cav"][[1, 7, 11], :, :100])
    assert same(read_phyts(tmp_path / "train"), both, columns=False)
    assert EventStore(tmp_path / "train", sampling_rate_Hz=200e6).sampling_rate_Hz == 200e6
    store.close()
    with h5py.File(tmp_path / "train/part1.hdf5", "a") as f:
        f["output_ts_Q"][4, 9] = np.nan
        assert fails("Q sample 9", read_phyts, tmp_path / "train").row == 4
        f["output_ts_Q"][4, 9] = 0
        f["energy_eV"][2] = np.nan
    error = fails("a known energy_eV", read_phyts, tmp_path / "train")
    assert error.row == 2 and error.path.name == "part1.hdf5"
    assert len(read_phyts(tmp_path / "train", require=())) == 12


def test_hdf5_labels_and_rates_are_checked(tmp_path):
    write_store(make_events(4), tmp_path / "s.h5")
    fails("expected sampling_rate_Hz 200000000, found 403000000 in the file", read_events, tmp_path / "s.h5",
          sampling_rate_Hz=200e6)
    fails("lo_frequency_Hz", read_events, tmp_path / "s.h5", lo_frequency_Hz=26e9)
    with h5py.File(tmp_path / "s.h5", "a") as f:
        del f["radius_m"], f["radius_phase"]
    fails("no radius_m, radius_phase", read_events, tmp_path / "s.h5")
    assert len(read_events(tmp_path / "s.h5", require=["energy_eV"])) == 4
    fails("a store, or a file ending in", read_events, tmp_path / "s.txt")


# --- pickles ---

def frame_of(e: Events, cells="array"):
    pandas = pytest.importorskip("pandas")
    make = {"array": list, "double": lambda x: list(x.astype(float)), "list": lambda x: x.tolist()}[cells]
    return pandas.DataFrame(e.columns | {n: make(e.ts[:, c]) for c, n in enumerate(module._ts_names())})


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("cells", ["array", "double", "list"])
def test_pickles_are_read(tmp_path, cells, protocol):
    e = make_events(6)
    e.columns["radius_input_m"] = np.arange(6.0)
    frame = frame_of(e, cells)
    frame["name"], frame["run"] = "x", range(6)
    frame.to_pickle(tmp_path / "a.pkl", protocol=protocol)
    frame.iloc[::2].to_pickle(tmp_path / "b.pkl.gz", protocol=protocol)
    e.columns["run"] = np.arange(6.0)
    assert same(read_events(tmp_path / "a.pkl"), e)
    assert same(read_pickle(tmp_path / "b.pkl.gz"), e[::2])
    assert read_pickle(tmp_path / "a.pkl", (), 200e6, 1e9).sampling_rate_Hz == 200e6


def test_frames_of_many_kinds_are_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    e = make_events(6)
    frame = frame_of(e)
    kinds = {
        "rows": frame[frame.energy_eV > 0].iloc[[0, 3]], "twice": pandas.concat([frame, frame]),
        "named": frame.set_index(pandas.Index(list("abcdef"), name="key")),
        "multi": pandas.concat({"a": frame, "b": frame}),
        "category": frame.assign(kind=pandas.Categorical(list("ababab"))),
        "date": frame.assign(when=pandas.Timestamp("2020-01-01")), "flag": frame.assign(ok=True),
        "nullable": frame.assign(run=pandas.array([1, 2, None, 4, 5, 6], dtype="Int64")),
    }
    for name, kind in kinds.items():
        kind.to_pickle(tmp_path / f"{name}.pkl")
        got = read_pickle(tmp_path / f"{name}.pkl")
        assert len(got) == len(kind) and np.array_equal(got.columns["energy_eV"], kind["energy_eV"])
    assert np.isnan(got.columns["run"][2]) and got.columns["run"][5] == 6


FRAMES = {  # two events of three samples, pickled by these versions of pandas; zlib, base 85
    "1.1.5": (
        'c-oCrTTc@~6mAQ}rAUATv|d8gL@i!6kPzd85h6y##u|Je@qtXH+i7Rx?sT1<L24wy2QH2C#`t^WC-D#T%<Pu5OEJvDo-=diJ7>-'
        '}v)|t6@6W}Y9cm`Rtbt?KYjff@ISz?d<FB#6Z>)c;7k=tpT~VVbY;mpT`?vc{5YBKAyCG({MR=^$)mK5=`|=@~C-'
        'BM^;LC%+2H7F8TgNe!D<MX{p>?wc06L+HJ>M2?z+tqSV=|072|Sd6@G<AO1N9ImUYo^&OHTkq741f?u0T1v<ycp9`+6;3*N6I(u2l2Y('
        '!Qp1s@M>n$aJU*AD`>)Q4$?d`5(GgtG)jV!+xqOLf5;dhjGFPZ*>sa)M_g7g+~!)t$?5gX=!yc7MKg<K~<k{)a2x=B+Toeci*)t<L%Z3'
        'p=&0DcYGXV0!|#XBa*lrH+&hR5E@S1h+6U{+EPSPAQ7YWf!T&8aBelq%r(~J0dz+v)vaOI0E`jtdvFu$OgvleW1r5@S$f^@M{o4lE5Kx'
        '475o9tUSv4S8P3+GbLq&ZR>Lw~Oin|9((~D!YT>}<Z}#P<FNbB{OLCsBq{&wYt&_3S89SS?<&3?Zv3D}|-'
        'm2~9JU_OByWOGfjliVZT`Lbix^qFwK~(NsW0ygl{z=g%Df;A6wa#{@wJgfKEPH*Ebn1dv;_UZ0xKAI@hqOW$=p*`=J|TTi;6M1n8U87C'
        '`!Qr!tFc9QY1v&$^Z~;Y*0iL?>PC5D4H&aNwv7X6B5#!g(uE)h^5oQ|58}bVEyjWG5i1Yy>hh+rG>18)8}x|&g0)h*N@Q$*B?N*2>SzS'
        '1r<5op0$YXJf{a)Q(7;_S>+U}jkjW_'),
    "1.3.5": (
        'c-oCrPjAyO6mPp0+769@U@L4w6YQ{Y=m`)=NSi1^jEW*SaAH_);>Hn)6KsdAh)LtnvP!<qd>;0Z_6^|KNm-'
        'i}u}I0Y^Zxj~pWp8tmVZ916zrp}#hAHRG@Xc(W{=~LXjOZTC4OPo$9nU-KF}Mgj6#oVb!XDtXOeJ+1JMjI!ye&6t1Hif$ocd--GjTT^%'
        'CaDC<;J%ImTT2I57WLXGiK9cQCCnvWM&jj0gIi-'
        'k=Mc2U?Yx>xa5s5*?|#>LyFVxSz%dlK^6Kj{A@W;>3xVkUVjuIjv$1Ap<zmnjGtPVW3;ZuKr<yw~Os+yEN2vSyf!wk4@#O)O)N)N2z{J'
        '6`$%(r}OGJJoeKrKnA1MVG88wRw@hI)3TbAi#d5CCmT7rnv-ied3ReIAgbNOhw>R9R}q2l5L+PBR5a-i;idC*;S5K5J%f-g(OU)yx-'
        '!P0WN}zir8iU6f6G<BWvbtWaOVQd!RFqm)tC)T)h7HuufjRlF5-3iEAu|dyiYE4)?e%FEbB##=Y2r1eum*tL&2&s-'
        'MKE=C(yT80CVcdwC#@h2Nys;sLFV4IphMb^!aq^uz6yzR5ii~_xgyu*XnBQONS!NynrB=cv{^S68M80=wP34)Z^rHLYUJ>FTZNlz+b$7'
        'sFsWh?*s92imC{rn50XNT|W^h1oC9dnA)1=qeRAuL{gxgsoh&`Fak!JLD5NUlYLYxv(N$d5$-'
        'zx&<>N29!!8jXLaDf_Mbn|e{_8o_ZG7YEEF?ouUn+K5c7e#1#E_KVxS+7Hxv?y?Op5wU9glexL~wgLcIWccDam$AlehiO=2JumIMX3OJ'
        'IZ@iKN^71JfzQga'),
    "1.5.3": (
        'c-oCrL2uJA6mGi~x(%^Sz^K@S&`#s9o)F@Iw230bs3@?*Zj<FCZW1kVg6*&sF=-'
        'rDR>`+Leh>ReJ8*|*CxbRCVmbId$M3WKeSYs9*T4U)SL~;kQp!Cl+ioIQyDw<WK+nFUioUY`89e?9N3gEzB=!a9hvVTPS4?mk$#zUR^_'
        'h^MZ@q{TcmHiZN4Q=t5F`p6`4<9ufn+=l-'
        'TjCW$6!qGJ)XtsAm2UCA{A00=m2*mg1HHoN@T7wfejl7`X=seL(ZUEIe|{qfp4$_>)mR%*{uyBSkMhm4N}8I*ZR+3begZv=<0Lm^?Gl9'
        ';b(_#MS(Nw9OuGZZ05GIHEEkAyI8V!OSV<At0nuWWY@L;uc4bx79xF)IyGbzy37(pPE~XLZq1Crd~iEhGPHv`m!xZ!bW7LXO;G((qPl6'
        'Q?!o%i4Q6n%GU~LZtI)K!`yZ-uMWgGWE`Ai~^8$T-'
        't+W0_7iU=%GsrcRYi?YyAs}VlnoMDj9WvQ=sKmsdBb*(OZSxQH4&Lj=rEg2X!?J*@7n;M#hEY?`GR}lQAZ!=YI}Mc^5XyZ_aF6+*A4o-'
        'oA}%Iu$OP#N_Az7J9gx?bLAU59{~t@sW{Dn#G%77LWt5~WcLnvrOp+LDrEt^0a+*&vm1c@4Nwz0uAHb-j>)h0NFB_VS+R-'
        'c1)WKq7B6LxpZLXd^851SgosxqmHUq=43=CGMmD*zQgq3Px?SuRIU6>iL?O^d@M>5i1b|(@uMeSScVRcZYu<sm!zCrpC^{soKMp1GgiI'
        '=5VJ5(_eQHNpEIhC2y{tf!@syh'),
    "2.2.3": (
        'c-oCrO>fgc5KYnq(iBlDpo9-'
        '0)KhyPXAVfM2tpK#06B20R%?4>Tea6_cTF2arE(xN(%w4!8zlOZ`VU}soj~FgQ6F|@z4K=GJ<ZH<{riu4#eRA%qui&m<E4Ui27)FG^zw'
        '76=nLzg!qyi!f=yi~NgzN!oDGk-VuI6Hb`r{Iz=Q;S?OB|9`>%^V!u9$DLE^}je<7e(NzSv#+m9J>4aNlD=6RA0i|k1rtB49ghnSTJ=A'
        '~RJk$cJnHf$j1tC-t{oPtyN3f-y;-=GhhPSt5TwGo7?y5Xx~W|-*O;0cURit{C1eG0u^@6|8-'
        '?BY}uxa00|A<X%9VJkcHwpp?_O7>RCwoCRw$v!ICjUB*e=%$-TNS~ul4H-usvjmY-'
        ')jZ#+nKfJquZL@fc6f72x@JkYb?wa@)z2lW+lJ~MY%V5P!p;40w|%h+P5Zk4p(+a+T?TdjbAmpbpwBLK*PrOgT^7X*as%aR%?dUGq^#T'
        'XCG4|9COa;bSokf%*#X%#|4{Gnt!_+x+X6ne1uQ<Og`3AlO})%G6Ty(M_gLOpq`Z(&9$<m{EC78^Dk>E5uwWx5$Uv|UIpf}ty!-'
        '^ZO+N<zI9fMH^f01v>7Xg&G-HJ;s2}B$B-'
        'kqxHw!JNl{8mbu85LkcW(C%j7qxBO`rGjk*TP@zI%~60$CV&`o_*k5(YgiPs0j}Q`e<RGnCpm44taY$;^V|1Dg;hi;-'
        '|TWk|vlwVLi>l~bi~ejI_mLIyDntb2#Xae5$$pJ&(uR521$m*Ma@k-6LX4R;-vxB'),
}


@pytest.mark.parametrize("version", FRAMES)
def test_frames_of_older_versions_are_read(tmp_path, version):
    pytest.importorskip("pandas")
    (tmp_path / "a.pkl").write_bytes(zlib.decompress(base64.b85decode(FRAMES[version])))
    e = read_pickle(tmp_path / "a.pkl")
    assert e.ts.tolist() == [[[1, 2, 3], [-1, -2, -3]], [[2, 3, 4], [-2, -3, -4]]]
    assert [e.columns[k].tolist() for k in COLUMNS] == [[1 + j, 2 + j] for j in range(8)]


class Call:
    "Pickles as a call of a function."

    def __init__(self, function, *args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


MARK = "malicious_pickle_ran"

def gadgets(mark: str) -> dict:
    import functools
    import operator
    import runpy
    import shutil
    touch = f"open({mark!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {mark}"), "eval": Call(eval, touch), "exec": Call(exec, touch),
        "getattr": Call(getattr, "x", "upper"), "import": Call(__import__, "os"),
        "subprocess": Call(subprocess.Popen, ["touch", mark]), "numpy.load": Call(np.load, mark, None, True),
        "numpy.fromfile": Call(np.fromfile, mark), "runpy": Call(runpy.run_path, mark),
        "rmtree": Call(shutil.rmtree, mark),
        "partial": Call(functools.partial(os.system, f"touch {mark}")), "open": Call(open, mark, "w"),
        "methodcaller": Call(operator.methodcaller("upper"), "x"),
        "codecs": Call(codecs.decode, b"x", "zip"), "pickle": Call(pickle.loads, pickle.dumps(Call(eval, touch))),
        "torch": Call(torch.load, mark), "copyreg": Call(copyreg._reconstructor, Path, object, None),
        "h5py": Call(h5py.File, mark, "w"), "random": Call(np.random.default_rng, 0),
    }


@pytest.mark.parametrize("name", gadgets(MARK))
@pytest.mark.parametrize("inside", [False, True])
def test_malicious_pickles_are_refused(tmp_path, name, inside, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    gadget = gadgets(str(tmp_path / MARK))[name]
    if inside:
        frame = frame_of(make_events(2))
        frame["extra"] = [gadget, 1]
        gadget = frame
    for protocol in (2, 5):
        data = pickle.dumps(gadget, protocol)
        (tmp_path / "a.pkl").write_bytes(data)
        with gzip.open(tmp_path / "b.pkl.gz", "wb") as f:
            f.write(data)
        for file in ("a.pkl", "b.pkl.gz"):
            error = fails("", read_pickle, tmp_path / file)
            assert error.path == tmp_path / file and "a call of" in error.found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "b.pkl.gz"]


def test_pickles_that_forge_arrays_are_refused(tmp_path):
    pytest.importorskip("pandas")

    def dtype(code, *state):
        return Call(np.dtype, code, False, True, state=(3, "|", *state))

    forged = {
        "an array of pointers": Call(np.ndarray, (1,), "O", b"\x41" * 8),
        "a dtype with fields": dtype("S8", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 0),
        "a subarray": dtype("S8", (np.dtype("O"), (1,)), None, None, 8, 8, 0),
        "an object dtype without flags": dtype("O8", None, None, None, -1, -1, 0),
        "a structured dtype": Call(np.dtype, [("a", "O")]),
        "text in another code": Call(codecs.encode, "x", "rot13"),
    }
    for name, call in forged.items():
        frame = frame_of(make_events(2))
        frame["extra"] = [call, 1]
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(frame, 2))
        assert "a pickled pandas frame" in str(fails("", read_pickle, tmp_path / "a.pkl")), name


def test_pickles_that_change_functions_are_refused(tmp_path):
    base = pytest.importorskip("pandas.core.indexes.base")
    (tmp_path / "a.pkl").write_bytes(b"cpandas.core.indexes.base\n_new_Index\n(N}S'changed'\nI1\nstb.")
    fails("a change of", read_pickle, tmp_path / "a.pkl")
    assert not hasattr(base._new_Index, "changed")


def test_damaged_pickles_and_other_objects_are_named(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "a.pkl"
    frame = frame_of(make_events(3))
    data = pickle.dumps(frame)
    path.write_bytes(data[:len(data) // 2])
    assert fails("", read_pickle, path).path == path
    path.write_bytes(gzip.compress(data)[:-20])
    fails("truncated", read_pickle, path)
    path.write_bytes(b"")
    fails("truncated", read_pickle, path)
    path.write_bytes(b"not a pickle")
    fails("a pickled pandas frame", read_pickle, path)
    path.write_bytes(pickle.dumps({"a": 1}))
    fails("found a dict", read_pickle, path)
    pandas.DataFrame({"a": []}).to_pickle(path)
    fails("at least one event", read_pickle, path)
    fails("no such file", read_pickle, tmp_path / "b.pkl")


LENGTHS = {  # pickles that state 8 GB
    "bytes": b"\x80\x05\x8e" + (2**33).to_bytes(8, "little"), "text": b"\x80\x05\x8d" + (2**33).to_bytes(8, "little"),
    "bytearray": b"\x80\x05\x96" + (2**33).to_bytes(8, "little"),
    "a frame": b"\x80\x05\x95" + (2**33).to_bytes(8, "little"),
    "a call": b"\x80\x04c__builtin__\nbytearray\n(\x8a\x05" + (2**33).to_bytes(5, "little") + b"tR.",
}
STATED = """
import resource, sys
from deadlayer_cres.cres import data
data._needed("pandas")
limit = 2**32
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        data.read_pickle(path)
    except data.DataError as e:
        print(e)
"""


def test_pickles_that_state_too_much_take_no_memory(tmp_path):
    pytest.importorskip("pandas")
    frame_of(make_events(2, samples=2**21)).to_pickle(tmp_path / "good.pkl", protocol=5)  # longer than a block
    assert same(read_pickle(tmp_path / "good.pkl"), make_events(2, samples=2**21))
    for name, data in LENGTHS.items():
        (tmp_path / f"{name}.pkl").write_bytes(data + b"x" * 100)
        (tmp_path / f"{name}.pkl.gz").write_bytes(gzip.compress(data + b"x" * 100))
    paths = sorted(str(p) for name in LENGTHS for p in tmp_path.glob(f"{name}.pkl*"))
    run = subprocess.run([sys.executable, "-c", STATED, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(paths) == 10 and "MemoryError" not in run.stdout, run.stdout


def test_bad_frames_name_file_and_row(tmp_path):
    pytest.importorskip("pandas")
    path, e = tmp_path / "a.pkl", make_events(5)

    def bad(change, match, **kwargs):
        frame = frame_of(make_events(5))
        change(frame)
        frame.to_pickle(path)
        error = fails(match, read_pickle, path, **kwargs)
        assert error.path == path
        return error.row

    bad(lambda f: f.__delitem__("radius_m"), "no radius_m")
    bad(lambda f: f.__delitem__("output_ts_Q"), "no output_ts_Q", require=())
    assert bad(lambda f: f.at.__setitem__((3, "output_ts_I"), np.zeros(60, "f4")), "64 samples in output_ts_I") == 3
    assert bad(lambda f: f.at.__setitem__((2, "output_ts_Q"), None), "in output_ts_Q") == 2
    assert bad(lambda f: f.at.__setitem__((1, "output_ts_Q"), np.full(64, np.nan, "f4")), "finite samples") == 1
    assert bad(lambda f: f.at.__setitem__((4, "energy_eV"), np.nan), "a known energy_eV") == 4
    bad(lambda f: f.__setitem__("output_ts_Q", list(e.ts[:, 1, :32])), "64 samples in output_ts_Q")
    bad(lambda f: f.__setitem__("energy_eV", ["high"] * 5), "no energy_eV")
    frame = frame_of(e)
    frame.loc[2, "pitch_angle_deg"] = UNSET
    frame.to_pickle(path)
    assert trapped(read_pickle(path)).tolist() == [True, True, False, True, True]


# --- eggs ---

def write_egg(path, values, *, kind=np.uint8, gain=2.0**-20, offset=-2.0**-13, channel_format=1, records=1,
              rate=403, version=b"3.2.0", streams=1, data_format=None):
    "An egg file of `values` (acquisitions, channels, 2, samples) in digitiser units, or volts if `kind` is a float."
    values = np.asarray(values)
    acquisitions, channels, _, samples = values.shape
    size = samples // records
    if data_format is None:
        data_format = {"u": 0, "i": 1, "f": 2}[np.dtype(kind).kind]
    common = {"acquisition_rate": np.uint32(rate), "record_size": np.uint32(size), "sample_size": np.uint32(2),
              "data_type_size": np.uint32(np.dtype(kind).itemsize), "data_format": np.uint32(data_format),
              "bit_depth": np.uint32(8), "bit_alignment": np.uint32(0)}
    with h5py.File(path, "w") as f:
        f.attrs.update({"egg_version": np.bytes_(version), "n_streams": streams,
                        "n_channels": np.uint32(channels * streams)})
        for s in range(streams):
            numbers = np.arange(channels, dtype=np.uint32) + s * channels
            group = f.create_group(f"streams/stream{s}")
            group.attrs.update(common | {"channels": numbers, "n_channels": np.uint32(channels),
                                         "channel_format": np.uint32(channel_format), "n_acquisitions": acquisitions})
            for k in range(acquisitions):
                v = values[k].reshape(channels, 2, records, size)
                order = (2, 3, 0, 1) if channel_format == 0 else (2, 0, 3, 1)
                v = v.transpose(order).reshape(records, -1).astype(kind) + s
                data = group.create_dataset(f"acquisitions/{k}", data=v)
                data.attrs.update({"first_record_time": np.uint64(k * 10**6), "n_records": np.uint32(records)})
            for c in numbers:
                f.create_group(f"channels/channel{c}").attrs.update(
                    common | {"dac_gain": gain * (1 + c), "voltage_offset": offset})
    return path


def write_json_truth(folder, events, rate=403.0):
    tree = {"run-id": "1-2", "run-parameters": {"run-type": "simulation", "sampling-freq-mega-hz": f"{rate:.1f}"},
            "nevents": len(events)}
    for i, tracks in enumerate(events):
        tree[str(i)] = {"event-tag": str(i), "ntracks": len(tracks)} | {str(j): t for j, t in enumerate(tracks)}
    (folder / "LocustEventProperties.json").write_text(json.dumps(tree))


def json_track(**changes):
    return {"start-time": 0.0, "end-time": 5e-6, "energy-ev": 18563.2, "start-radius": 2e-3, "start-radial-phase": 0.5,
            "output-avg-frequency": 141e6, "output-track-start-frequency": 140e6, "pitch-angle": 91.0, "slope": 3.3e8,
            "avg-axial-frequency": 6e6} | changes


def write_root_truth(folder, events, lo=25.9702e9, rate=403.0):
    uproot, awkward = pytest.importorskip("uproot"), pytest.importorskip("awkward")
    branches = dict(module._ROOT_BRANCHES)
    with uproot.recreate(folder / "LocustEventProperties.root") as f:
        for i, tracks in enumerate(events):
            tree = {b: awkward.Array([[t[k] for t in tracks]]) for k, b in branches.items()}
            f[f"Event_{1000 + i}"] = tree | {"ntracks": np.array([len(tracks)], np.int32)}
        f["Run Parameters"] = {"LOFrequency": np.array([lo]), "SamplingFrequencyMHz": np.array([rate])}


def root_track(**changes):
    return {"energy_eV": 18563.25, "pitch_angle_deg": 91.0, "start_carrier_frequency_Hz": 25.9e9 + 0.25,
            "avg_carrier_frequency_Hz": 25.901e9 + 0.125, "avg_axial_frequency_Hz": 6e6, "slope_Hz": 3.3e8,
            "radius_m": 2e-3, "radius_phase": 0.5, "start_time_s": 0.0, "track_length_s": 5e-6} | changes


def test_real_egg():
    folder = shared_data()
    if folder is None:
        pytest.skip("the real files are not here; set DEADLAYER_CRES_DATA")
    path = folder / "locust_mc_testSignal.egg"
    e = read_egg(path, require=(), lo_frequency_Hz=20.65e9)
    assert len(e) == 1 and e.samples == 8192 and e.sampling_rate_Hz == 200e6 and e.lo_frequency_Hz == 20.65e9
    spectrum = np.fft.fft(e.ts[0, 0] + 1j * e.ts[0, 1]) / 8192
    spectrum[0] = 0
    peak = np.abs(spectrum).argmax()
    assert np.fft.fftfreq(8192, 1 / 200e6)[peak] == 50e6
    assert abs(spectrum[peak]) == pytest.approx(3.45e-7, rel=3e-3)
    assert egg_info(path)["streams"]["stream0"]["acquisitions"] == [(1, 16384)]
    fails("200000000 in the file", read_egg, path, (), 403e6)
    fails("the truth of the run", read_egg, path)


@pytest.mark.parametrize("channel_format", [0, 1])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_egg_formats_streams_channels_and_records(tmp_path, kind, channel_format):
    rng = np.random.default_rng(0)
    raw = rng.integers(0 if np.dtype(kind).kind == "u" else -100, 200, (2, 3, 2, 60))
    path = write_egg(tmp_path / "a.egg", raw, kind=kind, channel_format=channel_format, records=4, streams=2)
    real = np.dtype(kind).kind == "f"
    for stream in (0, 1):
        for place in range(3):
            channel = 3 * stream + place
            e = read_egg(path, (), stream=stream, channel=channel)
            volts = raw[:, place] + stream
            volts = volts if real else volts * 2.0**-20 * (1 + channel) - 2.0**-13
            assert e.ts.shape == (2, 2, 60)
            np.testing.assert_allclose(e.ts, volts, rtol=1e-6, atol=1e-9)
            cut = read_egg(path, (), stream=stream, channel=channel, samples=20)
            assert np.array_equal(cut.ts, e.ts[:, :, :20])
    assert np.array_equal(read_egg(path, (), stream=1).ts, read_egg(path, (), stream=1, channel=3).ts)
    fails("stream2", read_egg, path, (), stream=2)
    fails("channels [0, 1, 2]", read_egg, path, (), channel=4)
    fails("at least 61 samples", read_egg, path, (), samples=61)


def test_egg_truth_from_json_root_and_both(tmp_path):
    raw = np.arange(2 * 64).reshape(1, 1, 2, 64)
    path = write_egg(tmp_path / "a.egg", raw)
    write_json_truth(tmp_path, [[json_track()]])
    e = read_egg(path)
    c = {k: v[0] for k, v in e.columns.items()}
    assert c["pitch_angle_deg"] == 89 and c["energy_eV"] == 18563.2 and c["tracks"] == 1
    assert c["start_carrier_frequency_Hz"] == LO_FREQUENCY_HZ - 201.5e6 + 140e6
    assert c["avg_carrier_frequency_Hz"] == LO_FREQUENCY_HZ - 201.5e6 + 141e6
    assert c["track_length_s"] == 5e-6 and trapped(e).all()
    assert read_egg(path, lo_frequency_Hz=25e9).columns["start_carrier_frequency_Hz"][0] == 25e9 - 201.5e6 + 140e6
    write_root_truth(tmp_path, [[root_track()]], lo=25.97e9)
    e = read_egg(path)
    c = {k: v[0] for k, v in e.columns.items()}
    assert e.lo_frequency_Hz == 25.97e9 and c["energy_eV"] == 18563.25 and c["pitch_angle_deg"] == 89
    assert c["avg_carrier_frequency_Hz"] == 25.901e9 + 0.125
    assert c["start_carrier_frequency_Hz"] == 25.97e9 - 201.5e6 + 140e6  # averaged over the start of the track: JSON
    fails("lo_frequency_Hz 26000000000", read_egg, path, lo_frequency_Hz=26e9)
    (tmp_path / "LocustEventProperties.json").unlink()
    assert read_egg(path).columns["start_carrier_frequency_Hz"][0] == 25.9e9 + 0.25
    (tmp_path / "elsewhere").mkdir()
    os.replace(tmp_path / "LocustEventProperties.root", tmp_path / "elsewhere/LocustEventProperties.root")
    fails("no LocustEventProperties.root", read_egg, path)
    assert read_egg(path, truth=tmp_path / "elsewhere").columns["energy_eV"][0] == 18563.25
    assert read_egg(path, require=()).columns == {}


def test_egg_untrapped_electrons_keep_their_marks(tmp_path):
    path = write_egg(tmp_path / "a.egg", np.ones((1, 1, 2, 64)))
    unset = {"pitch-angle": UNSET, "avg-axial-frequency": UNSET, "output-avg-frequency": UNSET}
    write_json_truth(tmp_path, [[json_track(**unset)]])
    e = read_egg(path)
    assert not trapped(e).any() and e.columns["pitch_angle_deg"][0] == UNSET
    assert e.columns["avg_carrier_frequency_Hz"][0] == UNSET


def test_egg_with_several_tracks_and_events(tmp_path):
    raw = np.arange(2 * 120).reshape(1, 1, 2, 120) % 251
    path = write_egg(tmp_path / "a.egg", raw, rate=400, offset=0.0, gain=1.0)
    second = json_track(**{"energy-ev": 18500.0, "pitch-angle": 88.5})
    write_json_truth(tmp_path, [[json_track(), second]], rate=400)
    c = read_egg(path).columns
    assert c["tracks"][0] == 2 and c["energy_eV_1"][0] == 18500 and c["pitch_angle_deg_1"][0] == 88.5
    at = [0.0, 50 / 400e6 + 1e-10, 80 / 400e6]
    one = [[json_track(**{"start-time": t, "energy-ev": 18500 + i})] for i, t in enumerate(at)]
    write_json_truth(tmp_path, one, rate=400)
    fails("1", read_egg, path)
    e = read_egg(path, samples=40)
    assert len(e) == 3 and np.array_equal(e.ts[1], raw[0, 0, :, 50:90]) and np.array_equal(e.ts[2], raw[0, 0, :, 80:])
    np.testing.assert_allclose(e.columns["start_time_s"], [0, 1e-10, 0], atol=1e-18)
    assert e.columns["energy_eV"].tolist() == [18500, 18501, 18502]
    error = fails("41 samples from the start", read_egg, path, samples=41)
    assert error.row == 2 and error.path == path
    two = write_egg(tmp_path / "two.egg", np.ones((2, 1, 2, 30)), rate=400)
    fails("2", read_egg, two)
    write_json_truth(tmp_path, [[json_track()], [json_track(**{"start-time": 1.1e-3})]], rate=400)
    np.testing.assert_allclose(read_egg(two).columns["start_time_s"], [0, 1e-4], atol=1e-15)


def test_bad_eggs_are_named(tmp_path):
    raw = np.ones((1, 1, 2, 64))
    good = write_egg(tmp_path / "a.egg", raw)
    (tmp_path / "t.egg").write_bytes(good.read_bytes()[:2000])
    fails("truncated", read_egg, tmp_path / "t.egg", ())
    fails("no such file", read_egg, tmp_path / "none.egg", ())
    (tmp_path / "x.egg").write_text("an egg")
    fails("HDF5", read_egg, tmp_path / "x.egg", ())
    fails("version 2.0.1", read_egg, write_egg(tmp_path / "v.egg", raw, version=b"2.0.1"), ())
    h5py.File(tmp_path / "n.egg", "w").close()
    fails("no egg_version", read_egg, tmp_path / "n.egg", ())
    fails("no records", read_egg, write_egg(tmp_path / "z.egg", np.ones((0, 1, 2, 64))), ())
    broken = np.ones((2, 1, 2, 64))
    broken[1, 0, 1, 5] = np.nan
    assert fails("Q sample 5", read_egg, write_egg(tmp_path / "f.egg", broken, kind="f8"), ()).row == 1
    uneven = write_egg(tmp_path / "u.egg", np.ones((2, 1, 2, 64)), records=2)
    with h5py.File(uneven, "a") as f:
        del f["streams/stream0/acquisitions/1"]
        f["streams/stream0/acquisitions/1"] = np.ones((1, 64), np.uint8)
    assert fails("64 samples as in the first event", read_egg, uneven, ()).row == 1
    assert read_egg(uneven, (), samples=32).ts.shape == (2, 2, 32)
    with h5py.File(uneven, "a") as f:
        del f["streams/stream0/acquisitions/1"]
        f["streams/stream0/acquisitions/1"] = np.ones((1, 60), np.uint8)
    fails("records of 64 numbers", read_egg, uneven, ())
    with h5py.File(good, "a") as f:
        del f["channels/channel0"].attrs["dac_gain"]
    assert "channel0" in str(fails("dac_gain", read_egg, good, ()))
    fails("floating-point samples", read_egg, write_egg(tmp_path / "k.egg", raw, data_format=2), ())


def _replace(f, name, data):
    del f[name]
    f[name] = data


ODD_EGGS = {
    "an acquisition by name": lambda f: f.move("streams/stream0/acquisitions/0", "streams/stream0/acquisitions/abc"),
    "acquisitions a dataset": lambda f: _replace(f, "streams/stream0/acquisitions", np.ones((2, 3))),
    "acquisitions numbers": lambda f: _replace(f, "streams/stream0/acquisitions", np.arange(2)),
    "acquisitions of groups": lambda f: f.create_group("streams/stream0/acquisitions/1"),
    "record size": lambda f: f["streams/stream0"].attrs.create("record_size", "big"),
    "gain": lambda f: f["channels/channel0"].attrs.create("dac_gain", [1.0, 2.0]),
    "channels": lambda f: f["streams/stream0"].attrs.create("channels", "all"),
    "time": lambda f: f["streams/stream0/acquisitions/0"].attrs.create("first_record_time", "noon"),
    "text": lambda f: f.attrs.create("run", np.bytes_(b"\xff\xfe")),
    "streams as bytes": lambda f: _replace(f, "streams", np.bytes_(b"one")),
    "a stream as bytes": lambda f: _replace(f, "streams/stream0", np.bytes_(b"one")),
    "no channels": lambda f: f.__delitem__("channels"),
}


@pytest.mark.parametrize("name", ODD_EGGS)
def test_odd_eggs_are_named(tmp_path, name):
    path = write_egg(tmp_path / "a.egg", np.ones((1, 1, 2, 64)))
    with h5py.File(path, "a") as f:
        ODD_EGGS[name](f)
    for call in (lambda: read_egg(path, ()), lambda: prepare(path, tmp_path / "s", PrepareConfig(()))):
        assert fails("", call).path == path


def test_bad_truth_is_named(tmp_path):
    path = write_egg(tmp_path / "a.egg", np.ones((1, 1, 2, 64)))
    write_json_truth(tmp_path, [[json_track()]], rate=200)
    assert fails("200 MHz", read_egg, path).path.suffix == ".json"
    write_json_truth(tmp_path, [[json_track(**{"energy-ev": "much"})]])
    fails("the truth of a Locust run", read_egg, path)
    track = json_track()
    del track["energy-ev"]
    write_json_truth(tmp_path, [[track]])
    fails("no energy_eV", read_egg, path)
    write_json_truth(tmp_path, [])
    fails("0 events", read_egg, path)
    (tmp_path / "LocustEventProperties.json").write_text("{")
    fails("JSON", read_egg, path)
    write_json_truth(tmp_path, [[json_track()]])
    write_root_truth(tmp_path, [[root_track()], [root_track()]])
    assert fails("2 events", read_egg, path).path.suffix == ".json"
    (tmp_path / "LocustEventProperties.root").write_bytes(b"root")
    assert fails("ROOT", read_truth, tmp_path, 403e6).path.suffix == ".root"


# --- preparing ---

def write_inputs(folder, files=6, n=8, samples=64):
    folder.mkdir(exist_ok=True)
    parts = [make_events(n, samples, seed=k) for k in range(files)]
    for k, part in enumerate(parts):
        write_seed_hdf5(part, folder / f"part_{k}.hdf5")
    return concatenate([read_phyts(folder / f"part_{k}.hdf5") for k in range(files)])


def test_prepare_takes_files_of_every_kind(tmp_path):
    pytest.importorskip("pandas")
    source = tmp_path / "in"
    (source / "runs/7").mkdir(parents=True)
    a, b = make_events(9), make_events(5, seed=1)
    b.columns["pitch_angle_deg"][[1, 3]] = UNSET
    write_store(a, source / "store", shard_events=4)
    frame_of(b).to_pickle(source / "frame.pkl.gz")
    write_egg(source / "runs/7/run.egg", np.ones((1, 1, 2, 64)))
    write_json_truth(source / "runs/7", [[json_track()]])
    (source / "notes.txt").write_text("x")
    (source / "old.part").mkdir()
    (source / "old.part/shard_00000.h5").write_text("torn")
    summary = prepare(source, tmp_path / "out", PrepareConfig(shard_MB=0.003), show_progress=False)
    got = read_store(tmp_path / "out")
    assert len(got) == summary.events == 13 and summary.dropped == {"untrapped": 2} and summary.samples == 64
    reports = {Path(r.path).name: r for r in summary.files}
    assert reports["frame.pkl.gz"].read == 5 and reports["frame.pkl.gz"].kept == 3 and reports["run.egg"].kept == 1
    assert set(reports) == {"frame.pkl.gz", "run.egg", "shard_00000.h5", "shard_00001.h5", "shard_00002.h5"}
    assert summary.shards == len(list((tmp_path / "out").glob("shard_*.h5"))) > 2
    assert np.array_equal(got.ts[:3], b.ts[trapped(b)]) and np.array_equal(got.ts[-9:], a.ts)
    assert np.array_equal(got.columns["energy_eV"][-9:], a.columns["energy_eV"])
    kept = prepare([source / "frame.pkl.gz"], tmp_path / "all", PrepareConfig(untrapped="keep"), show_progress=False)
    assert kept.events == 5
    fails("not taken", prepare, source, tmp_path / "out")
    fails("none", prepare, tmp_path / "in/*.root", tmp_path / "no")
    fails("found notes.txt", prepare, source / "notes.txt", tmp_path / "no")


def test_prepare_cuts_large_files_into_shards_and_joins_small_ones(tmp_path):
    events = write_inputs(tmp_path / "in", 3)
    size = 8 * 64
    for rows, shards in ((3, 3 * 3), (20, 2), (1000, 1)):
        out = tmp_path / f"out{rows}"
        config = PrepareConfig(shard_MB=rows * size / 1e6)
        summary = prepare(str(tmp_path / "in/*.hdf5"), out, config, show_progress=False)
        assert same(read_store(out), events) and summary.shards == shards
        assert all(r.read == r.kept == 8 for r in summary.files) and len(summary.files) == 3


def test_prepare_cuts_samples_windows_and_noise(tmp_path):
    e = write_phyts(tmp_path / "a.hdf5", 6)
    prepare(tmp_path / "a.hdf5", tmp_path / "s", PrepareConfig(samples=100), show_progress=False)
    got = read_store(tmp_path / "s")
    assert np.array_equal(got.ts, e.ts[:, :, :100]) and np.array_equal(got.noise["cav"], e.noise["cav"][:, :, :100])
    summary = prepare(tmp_path / "a.hdf5", tmp_path / "w", PrepareConfig(window=32, noise=False), show_progress=False)
    got = read_store(tmp_path / "w")
    assert summary.events == 24 and not got.noise and np.array_equal(got.ts[5], e.ts[1, :, 32:64])
    assert summary.files[0].read == 6 and summary.files[0].kept == 24
    assert got.columns["event"].tolist() == np.repeat(np.arange(6), 4).tolist()
    fails("at least 129 samples", prepare, tmp_path / "a.hdf5", tmp_path / "no", PrepareConfig(samples=129))
    fails("windows of 1 to 128", prepare, tmp_path / "a.hdf5", tmp_path / "no2", PrepareConfig(window=129),
          error=ConfigError)
    fails("drop or keep", PrepareConfig, untrapped="eat", error=ConfigError)
    fails("shard_MB", PrepareConfig, shard_MB=0, error=ConfigError)


def test_prepare_stops_at_bad_files_or_skips_them(tmp_path):
    write_inputs(tmp_path / "in", 4)
    bad = tmp_path / "in/part_2.hdf5"
    bad.write_bytes(bad.read_bytes()[:5000])
    with h5py.File(tmp_path / "in/part_1.hdf5", "a") as f:
        f["output_ts_I"][5, 3] = np.nan
    small = PrepareConfig(shard_MB=3 * 8 * 64 / 1e6)
    assert fails("truncated", prepare, tmp_path / "in", tmp_path / "s", small).path == bad
    bad.unlink()
    error = fails("I sample 3", prepare, tmp_path / "in", tmp_path / "s", small)
    assert error.row == 5 and error.path.name == "part_1.hdf5"
    assert not (tmp_path / "s").exists()
    bad.write_bytes(b"egg")
    skip = PrepareConfig(shard_MB=8 * 8 * 64 / 1e6, bad="skip")
    summary = prepare(tmp_path / "in", tmp_path / "t", skip, show_progress=False)
    assert summary.events == 16 and [Path(r.path).name for r in summary.failed] == ["part_1.hdf5", "part_2.hdf5"]
    for k in (0, 1, 3):
        (tmp_path / f"in/part_{k}.hdf5").unlink()
    fails("at least one trapped event", prepare, tmp_path / "in", tmp_path / "u", skip)


def test_prepare_takes_stream_channel_and_truth_of_eggs(tmp_path, monkeypatch):
    raw = np.arange(2 * 2 * 64).reshape(1, 2, 2, 64) % 200
    path = write_egg(tmp_path / "a.egg", raw, streams=2)
    assert "require no labels" in fails("truth", prepare, path, tmp_path / "s").remedy
    (tmp_path / "truth").mkdir()
    write_json_truth(tmp_path / "truth", [[json_track()]])
    monkeypatch.chdir(tmp_path)
    for channel in (None, 3):
        config = PrepareConfig(stream=1, channel=channel, truth="truth")
        prepare(path, tmp_path / f"s{channel}", config, show_progress=False)
        wanted = read_egg(path, stream=1, channel=channel or 2, truth=tmp_path / "truth")
        assert same(read_store(tmp_path / f"s{channel}"), wanted)
    fails("channels [2, 3]", prepare, path, tmp_path / "t", PrepareConfig(stream=1, channel=0, truth="truth"))


def test_prepare_takes_no_input_from_its_output(tmp_path, monkeypatch):
    events = write_inputs(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    for inputs in (".", ".", [".", "*.hdf5", "**/*5"]):
        if inputs != ".":
            (tmp_path / ".st.old").mkdir()
            (tmp_path / "st.part").mkdir()
            write_store(events, ".st.old/a.h5")
        summary = prepare(inputs, "st", overwrite=True, show_progress=False)
        assert summary.events == 24 and same(read_store("st"), events)
    assert fails("inputs outside of the store", prepare, ["st", "."], "st", overwrite=True).path == Path("st")
    fails("inputs outside of the store", prepare, "st/shard_00000.h5", tmp_path / "st", overwrite=True)
    assert same(read_store("st"), events)


def test_prepare_names_files_that_do_not_fit(tmp_path):
    write_inputs(tmp_path / "in", 2)
    write_seed_hdf5(make_events(3, samples=32), tmp_path / "in/part_9.hdf5")
    for shard_MB in (1e-3, 100):
        config = PrepareConfig(shard_MB=shard_MB)
        error = fails("samples 64", prepare, tmp_path / "in", tmp_path / f"s{shard_MB}", config)
        assert Path(error.path).name == "part_9.hdf5"


PROGRAM = """
import sys
from deadlayer_cres.cres import data
config = data.PrepareConfig(shard_MB=float(sys.argv[3]))
slow = data._write_shard
def write(path, events):
    import time
    time.sleep(0.05)
    slow(path, events)
data._write_shard = write
print("ready", flush=True)
data.prepare(sys.argv[1], sys.argv[2], config, show_progress=False)
"""


def test_prepare_goes_on_after_kill_9(tmp_path):
    events = write_inputs(tmp_path / "in", 8, samples=4096)
    out, part, config = tmp_path / "out", tmp_path / "out.part", PrepareConfig(shard_MB=8 * 8 * 4096 / 1e6)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(out), str(config.shard_MB)],
                               stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    while len(list(part.glob("shard_*.h5"))) < 3 and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = {p.name: p.stat().st_mtime_ns for p in part.glob("shard_*.h5")}
    assert 3 <= len(before) < 8 and not out.exists()
    fails("of other inputs or settings", prepare, tmp_path / "in", out, PrepareConfig(shard_MB=1))
    summary = prepare(tmp_path / "in", out, config, show_progress=False)
    assert summary.resumed_shards == len(before) and summary.shards == 8 and not part.exists()
    assert all((out / name).stat().st_mtime_ns == t for name, t in before.items())
    assert same(read_store(out), events) and all(r.read == r.kept == 8 for r in summary.files)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


MEMORY = """
import resource, sys
from deadlayer_cres.cres import data
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summary = data.prepare(sys.argv[1], sys.argv[2], data.PrepareConfig(shard_MB=8), show_progress=False)
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, summary.events)
"""


def test_prepare_holds_memory_down(tmp_path):
    n, samples = 400, 24576  # 79 MB of samples, shards of 8 MB
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "large.hdf5", "w") as f:
        for k in COLUMNS:
            f[k] = rng.uniform(1, 2, n).astype(np.float32)
        for name in module._ts_names():
            data = f.create_dataset(name, (n, samples), np.float32)
            for a in range(0, n, 100):
                data[a:a + 100] = rng.standard_normal((100, samples), np.float32)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "large.hdf5"), str(tmp_path / "out")],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    base, peak, events = map(int, run.stdout.split())
    scale = 1024 if sys.platform == "linux" else 1  # kB on Linux, bytes on macOS
    assert events == n and (peak - base) * scale < 40e6, f"{(peak - base) * scale / 1e6:.0f} MB more"
    store = EventStore(tmp_path / "out")
    with h5py.File(tmp_path / "large.hdf5") as f:
        assert np.array_equal(store.read([377]).ts[0, 1], f["output_ts_Q"][377])


def test_prepare_on_a_dask_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    events = write_inputs(tmp_path / "in", 5)
    config = PrepareConfig(shard_MB=8 * 8 * 64 / 1e6)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        summary = prepare(tmp_path / "in", tmp_path / "out", config, scheduler=cluster.scheduler_address,
                          show_progress=False)
        assert summary.shards == 5 and same(read_store(tmp_path / "out"), events)
        with h5py.File(tmp_path / "in/part_4.hdf5", "a") as f:
            f["output_ts_I"][5, 3] = np.nan
        error = fails("I sample 3", prepare, tmp_path / "in", tmp_path / "bad", config,
                      scheduler=cluster.scheduler_address, show_progress=False)
        assert error.row == 5 and error.path.name == "part_4.hdf5"
    assert not (tmp_path / "bad").exists()


def test_a_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    write_inputs(tmp_path / "in", 1)

    def refuse(*args, **kwargs):
        raise OSError("timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    fails("tcp://nowhere:1", prepare, tmp_path / "in", tmp_path / "out", scheduler="tcp://nowhere:1", error=ConfigError,
          show_progress=False)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name, function in (("pandas", lambda: read_pickle(tmp_path / "a.pkl")),
                           ("uproot", lambda: module._read_root_truth(tmp_path))):
        monkeypatch.setitem(sys.modules, name, None)
        fails(f"pip install {name}", function, error=ConfigError)


# --- windows, splits, batches ---

def test_windows_follow_the_chirp_and_leave_out_what_the_track_does_not_reach():
    e = make_events(2, samples=100)
    e.columns["slope_Hz"] *= 3e8
    e = Events(e.ts, e.columns | {"start_time_s": [0.0, 55 / 403e6], "track_length_s": [100 / 403e6, 30 / 403e6]})
    w = cut_windows(e, 20)
    assert w.columns["event"].tolist() == [0] * 5 + [1] * 3 and w.columns["window"].tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert np.array_equal(w.ts[6], e.ts[1, :, 60:80])
    slope = e.columns["slope_Hz"]
    f0 = e.columns["start_carrier_frequency_Hz"]
    expected = f0[0] + slope[0] * 20 * np.arange(5) / 403e6
    np.testing.assert_array_equal(w.columns["start_carrier_frequency_Hz"][:5], expected)
    np.testing.assert_array_equal(w.columns["start_carrier_frequency_Hz"][5:],
                                  f0[1] + slope[1] * np.array([0, 5 / 403e6, 25 / 403e6]))
    np.testing.assert_allclose(w.columns["start_time_s"], np.array([0, 0, 0, 0, 0, 15, 0, 0]) / 403e6, atol=1e-15)
    np.testing.assert_array_equal(w.columns["energy_eV"], e.columns["energy_eV"][[0] * 5 + [1] * 3])
    middle = w.columns["avg_carrier_frequency_Hz"][:5] - e.columns["avg_carrier_frequency_Hz"][0]
    np.testing.assert_allclose(middle, slope[0] * 20 * np.arange(-2, 3) / 403e6, atol=1e-9)
    assert len(cut_windows(e, 20, stride=10)) == 9 + len([k for k in range(9) if k * 10 < 85 and k * 10 + 20 > 55])
    fails("windows of 1 to 100 samples", cut_windows, e, 101, error=ConfigError)
    fails("stride", cut_windows, e, 10, 0, error=ConfigError)


def test_windows_are_labelled_by_the_part_of_the_track_inside():
    rate, slope = 403e6, 3e8
    e = make_events(2, samples=100)
    start, length = np.array([-10, 25]) / rate, np.array([65, 40]) / rate  # in samples: -10 to 55, 25 to 65
    e.columns |= {"slope_Hz": np.full(2, slope), "start_time_s": start, "track_length_s": length}
    e.columns["avg_carrier_frequency_Hz"] = e.columns["start_carrier_frequency_Hz"] + slope * length / 2
    e.columns |= {k: np.ones(2) for k in ("axial_phase", "cyclotron_phase", "snr", "tracks")}
    w = cut_windows(e, 20)
    assert w.columns["window"].tolist() == [0, 1, 2, 1, 2, 3]
    np.testing.assert_allclose(w.columns["start_time_s"] * rate, [0, 0, 0, 5, 0, 0], atol=1e-9)
    np.testing.assert_allclose(w.columns["track_length_s"] * rate, [20, 20, 15, 15, 20, 5])
    for i, (k, j) in enumerate(zip(w.columns["event"].astype(int), w.columns["window"].astype(int), strict=True)):
        begin, end = max(20 * j, start[k] * rate) / rate, min(20 * j + 20, (start[k] + length[k]) * rate) / rate
        f = e.columns["start_carrier_frequency_Hz"][k] + slope * (np.linspace(begin, end, 1001) - start[k])
        assert w.columns["start_carrier_frequency_Hz"][i] == pytest.approx(f[0], abs=1e-3)
        assert w.columns["avg_carrier_frequency_Hz"][i] == pytest.approx(f.mean(), abs=1e-3)
    assert not {"axial_phase", "cyclotron_phase", "snr"} & set(w.columns)
    e.columns["avg_carrier_frequency_Hz"][1] = UNSET
    assert (cut_windows(e, 20).columns["avg_carrier_frequency_Hz"][3:] == UNSET).all()


@pytest.mark.parametrize("column", ["tracks", "energy_eV_1"])
def test_windows_of_events_with_several_tracks_are_refused(tmp_path, column):
    e = make_events(4, samples=100)
    one, several = {"tracks": (1, 2), "energy_eV_1": (np.nan, 18500.0)}[column]
    e.columns[column] = np.full(4, one)
    assert len(cut_windows(e, 50)) == 8
    e.columns["pitch_angle_deg"][0] = UNSET  # left out before the windows are cut
    e.columns[column][2] = several
    assert fails("events of one track", cut_windows, e, 50).row == 2
    write_store(e, tmp_path / "in.h5")
    error = fails("leave the window out", prepare, tmp_path / "in.h5", tmp_path / "s", PrepareConfig(window=50),
                  show_progress=False)
    assert error.row == 2 and error.path == tmp_path / "in.h5" and not (tmp_path / "s").exists()
    assert prepare(tmp_path / "in.h5", tmp_path / "s", show_progress=False).events == 3


def test_split_does_not_depend_on_company_order_or_precision():
    e = make_events(4000, samples=4)
    config = SplitConfig(seed=3, valid=0.2, test=0.1)
    parts = config.split(e)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(4000))
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(part) - 4000 * fraction) < 4 * (4000 * fraction * (1 - fraction)) ** 0.5
    order = np.random.default_rng(0).permutation(4000)
    mixed = config.split(e[order])
    assert all(np.array_equal(np.sort(order[m]), p) for m, p in zip(mixed, parts, strict=True))
    half = Events(None, {k: v.astype(np.float32) for k, v in e.columns.items()})
    assert all(np.array_equal(a, b) for a, b in zip(config.split(half), parts, strict=True))
    more = concatenate([make_events(50, 4, seed=9), e])
    assert all(np.array_equal(a[a >= 50] - 50, b) for a, b in zip(config.split(more), parts, strict=True))
    other = SplitConfig(seed=4, valid=0.2, test=0.1).split(e)
    assert len(np.intersect1d(other[2], parts[2])) < 100
    windows = cut_windows(Events(e.ts[:100], e[:100].columns), 2)
    lots = event_lots(windows.columns, 3)
    assert np.array_equal(lots[::2], lots[1::2]) and np.array_equal(lots[::2], event_lots(e.columns, 3)[:100])
    fails("labels to split by", event_lots, {"slope_Hz": np.zeros(3)}, 0)
    fails("leave some for training", SplitConfig, valid=0.5, test=0.5, error=ConfigError)


def test_lots_are_even_and_independent_of_the_seed():
    columns = {"energy_eV": np.arange(20000.0)}  # neighbouring numbers
    a, b = event_lots(columns, 0), event_lots(columns, 1)
    counts = np.histogram(a, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi2 of 19 degrees of freedom, 1 in 1000
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03


def test_cuts_leave_the_test_set_alone():
    e = make_events(2000, samples=4)
    whole = SplitConfig(seed=0).split(e)
    cut = SplitConfig(seed=0, max_axial_frequency_Hz=1.5, max_carrier_frequency_Hz=1.8).split(e)
    keep = (e.columns["avg_axial_frequency_Hz"] <= 1.5) & (e.columns["avg_carrier_frequency_Hz"] <= 1.8)
    assert np.array_equal(cut[2], whole[2]) and not keep[cut[2]].all()
    assert all(np.array_equal(c, w[keep[w]]) for c, w in zip(cut[:2], whole[:2], strict=True))
    del e.columns["avg_axial_frequency_Hz"]
    fails("avg_axial_frequency_Hz", SplitConfig(max_axial_frequency_Hz=1).split, e)


def all_of(batches):
    x, y = zip(*batches, strict=True)
    return torch.cat(x).numpy(), torch.cat(y).numpy()


def test_batches_in_memory():
    e = make_events(50, noise=["cav"])
    batches = EventBatches(e, 16, ["energy_eV", "start_carrier_frequency_Hz"], seed=1)
    first = list(batches)
    assert len(first) == len(batches) == 4 and [len(x) for x, _ in first] == [16, 16, 16, 2]
    assert first[0][0].shape == (16, 2, 64)
    assert first[0][0].dtype == torch.float32 and first[0][1].dtype == torch.float64
    x, y = all_of(first)
    order = [int(np.flatnonzero(e.columns["energy_eV"] == v)[0]) for v in y[:, 0]]
    assert sorted(order) == list(range(50)) and order != list(range(50)) and np.array_equal(x, e.ts[order])
    assert np.array_equal(y[:, 1], e.columns["start_carrier_frequency_Hz"][order])
    assert np.array_equal(all_of(batches)[0], x)
    batches.set_epoch(1)
    assert not np.array_equal(all_of(batches)[0], x)
    fixed = EventBatches(e, 16, fixed=True, noise="cav")
    fixed.set_epoch(5)
    assert np.array_equal(all_of(fixed)[0], e.ts + e.noise["cav"])
    thrice = EventBatches(e, 16, repeat=3)
    assert len(thrice) == 10 and np.array_equal(np.unique(all_of(thrice)[1], return_counts=True)[1], np.full(50, 3))
    fails("at least one event", EventBatches, e[:0], 16)
    fails("labels only", EventBatches, Events(None, e.columns), 16)
    fails("'thermal'", EventBatches, e, 16, noise="thermal", error=ConfigError)
    fails("mass_eV", EventBatches, e, 16, ["mass_eV"], error=ConfigError)
    fails("batch_size", EventBatches, e, 0, error=ConfigError)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    e = make_events(203, samples=32, noise=["cav"])
    path = tmp_path_factory.mktemp("stored") / "s"
    write_store(e, path, shard_events=30)
    return e, EventStore(path)


def test_batches_from_blocks_hold_every_event_once(stored):
    e, store = stored
    rows = np.flatnonzero(np.arange(203) % 3)
    batches = BlockBatches(store, 8, rows, seed=1, block=10, buffer=3)
    first = list(batches)
    x, y = all_of(first)
    assert len(first) == len(batches) == 17 and [len(b) for b, _ in first] == [8] * 16 + [len(rows) - 128]
    order = [int(np.flatnonzero(e.columns["energy_eV"] == v)[0]) for v in y[:, 0]]
    assert sorted(order) == rows.tolist() and np.array_equal(x, e.ts[order])
    assert np.abs(np.diff(order)).mean() > 20  # shuffled beyond a block
    assert np.array_equal(all_of(batches)[0], x)
    batches.set_epoch(1)
    y_next = all_of(batches)[1]
    assert len(np.intersect1d(y_next[:24], y[:24])) < 20  # other blocks come first
    fixed = BlockBatches(store, 8, rows, fixed=True, noise="cav", samples=20)
    assert np.array_equal(all_of(fixed)[0], (e.ts + e.noise["cav"])[rows, :, :20])
    twice = BlockBatches(store, 8, rows, repeat=2)
    assert np.array_equal(np.unique(all_of(twice)[1], return_counts=True)[1], np.full(len(rows), 2))
    fails("at least one event", BlockBatches, store, 8, rows[:0])
    fails("block and buffer", BlockBatches, store, 8, block=0, error=ConfigError)


@pytest.mark.parametrize("fixed", [False, True])
def test_workers_give_the_same_batches_in_the_same_order(stored, fixed):
    _, store = stored
    store.read([0])  # a handle open in this process must not be used in the workers
    alone = list(BlockBatches(store, 8, seed=1, block=10, buffer=2, fixed=fixed))
    shared = list(BlockBatches(store, 8, seed=1, block=10, buffer=2, fixed=fixed, workers=2))
    assert len(alone) == len(shared)
    assert all(torch.equal(a, b) for one, two in zip(alone, shared, strict=True) for a, b in zip(one, two, strict=True))


def test_batches_train_a_network(stored):
    train = pytest.importorskip("deadlayer_cres.train")
    _, store = stored
    split = SplitConfig(seed=0).split(store)
    loaders = train.as_dataloaders(BlockBatches(store, 16, split[0]),
                                   EventBatches(store.read(split[1]), 16, fixed=True), device="cpu")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))

    def loss(prediction, target):
        return torch.nn.functional.mse_loss(prediction, ((target - 18600) / 57).float())

    learn = train.build_learner(train.Pipeline(None, net), loaders, loss, train.TrainConfig(epochs=2, progress=False))
    learn.fit(2)
    assert np.isfinite(float(learn.validate()[0]))


def test_a_store_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_OPEN", 3)
    e = make_events(10, samples=4)
    write_store(e, tmp_path / "s", shard_events=1)
    store = EventStore(tmp_path / "s")
    assert np.array_equal(store.read().ts, e.ts) and len(store._open) == 3
    store.close()
    assert np.array_equal(store.read([5]).ts, e.ts[[5]])


def test_shared_data_is_found(tmp_path, monkeypatch):
    (tmp_path / "shared/data/cres").mkdir(parents=True)
    (tmp_path / "shared/data/cres/locust_mc_testSignal.egg").touch()
    (tmp_path / "main/nbs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "main/nbs")
    monkeypatch.delenv("DEADLAYER_CRES_DATA", raising=False)
    assert shared_data() == tmp_path / "shared/data/cres"
    for name in ("shared/data", "shared/data/cres"):
        monkeypatch.setenv("DEADLAYER_CRES_DATA", str(tmp_path / name))
        assert shared_data() == tmp_path / "shared/data/cres"
    monkeypatch.setenv("DEADLAYER_CRES_DATA", str(tmp_path / "main"))
    assert shared_data() is None
    monkeypatch.setenv("DEADLAYER_CRES_DATA", str(tmp_path / "nowhere"))
    fails("DEADLAYER_CRES_DATA", shared_data, error=ConfigError)
