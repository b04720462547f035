"""Solids, crystals from metadata, and the photons that meet everything around the crystal."""

import json

import numpy as np
import pytest

from deadlayer_cres.core import ConfigError, DataError
from deadlayer_cres.deadlayer.detector import (
    Box,
    Cone,
    Crystal,
    Setup,
    Surroundings,
    active_volume_cm3,
    bench_setup,
    cross_sections,
    crystal_volumes,
    distance_to_nplus_mm,
    fluorescence,
    inside,
    mass_g,
    read_detector,
    volume_cm3,
    volumes,
)
from deadlayer_cres.deadlayer.simulate import Geometry, Photons, fly, isotropic, sample_decays, simulate_hits, track

SHAPED = Crystal(radius_mm=37, height_mm=75, borehole_depth_mm=45, nplus_free_radius_mm=14, top_taper_height_mm=20,
                 top_taper_angle_deg=15, bottom_taper_height_mm=2, bottom_taper_angle_deg=45,
                 borehole_taper_height_mm=9, borehole_taper_angle_deg=20, groove_inner_radius_mm=11,
                 groove_outer_radius_mm=14, groove_depth_mm=2)


def rays(n, seed=0, low=-60, high=160):
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, (3, n)) * np.array([[0.5], [0.5], [1.0]]), isotropic(n, rng)


@pytest.mark.parametrize("solid", [Cone("Ge", 0, 50, 30, 30), Cone("Ge", 0, 50, 10, 45), Cone("Ge", -10, 40, 45, 0.5),
                                   Box("Ge", (-20, -30, 0), (40, 25, 70))])
def test_crossings_agree_with_points_along_the_ray(solid):
    position, direction = rays(2000)
    start, end = solid.crossings(position, direction)
    for s in np.linspace(-150, 150, 61):
        x, y, z = position + s * direction
        if isinstance(solid, Cone):
            edge = solid.r_low + (solid.r_high - solid.r_low) / (solid.z_high - solid.z_low) * (z - solid.z_low)
            there = (np.hypot(x, y) < edge) & (z > solid.z_low) & (z < solid.z_high)
        else:
            limits = zip((x, y, z), solid.low, solid.high, strict=True)
            there = np.all([(low < c) & (c < high) for c, low, high in limits], axis=0)
        assert ((start < s) & (s < end) == there).all()


def test_pieces_find_the_first_solid_that_holds_a_point():
    setup = bench_setup(SHAPED)
    geometry = Geometry(volumes(setup))
    position, direction = rays(3000, 1)
    start, material = geometry.pieces(Photons(np.arange(3000), np.ones(3000), position, direction), 0)
    for s in (0.5, 20.0, 90.0):
        point = position + s * direction
        piece = np.clip((start <= s).sum(1) - 1, 0, None)
        found = np.where((start <= s).any(1), material[np.arange(3000), piece], geometry.material[-1])
        expected = np.full(3000, geometry.material[-1])
        for solid in reversed(geometry.solids):
            a, b = solid.crossings(point, direction)
            expected[(a < 0) & (b > 0)] = geometry.materials.index(solid.material)
        assert (found == expected).all()


def test_whoever_misses_the_cryostat_flies_the_same_way():
    geometry = Geometry(volumes(bench_setup()))
    assert geometry.solids[geometry.hull].r_low == 50.8
    whole = Geometry(volumes(bench_setup()))
    whole.hull = -1
    position, direction = rays(20_000, 2, 0, 250)
    photons = Photons(np.arange(20_000), np.full(20_000, 100.0), position, direction)
    seen = [fly(photons, g, np.random.default_rng(3)) for g in (geometry, whole)]
    assert abs(len(seen[0][0]) - len(seen[1][0])) < 5 * np.sqrt(20_000) * 0.5
    share = [np.bincount(m, minlength=len(geometry.materials)) / 20_000 for _, m in seen]
    assert np.abs(share[0] - share[1]).max() < 0.02


def test_shaped_crystal():
    assert not SHAPED.plain and Crystal().plain
    rng = np.random.default_rng(4)
    points = rng.uniform([-37, -37, 0], [37, 37, 75], (400_000, 3)).T
    germanium = inside(*points, SHAPED)
    assert 4 * 37**2 * 75e-3 * germanium.mean() == pytest.approx(volume_cm3(SHAPED), rel=0.005)
    depth, bore = distance_to_nplus_mm(*points, SHAPED)
    assert (np.isfinite(depth) == germanium).all() and bore[germanium].any()
    assert 4 * 37**2 * 75e-3 * (depth > 1).mean() == pytest.approx(active_volume_cm3(SHAPED, 1.0), rel=0.005)
    assert active_volume_cm3(SHAPED, 0.0) == pytest.approx(volume_cm3(SHAPED), rel=1e-3)
    assert mass_g(SHAPED) == pytest.approx(volume_cm3(SHAPED) * 5.537)
    # 1 mm inside the middle of the taper, along its normal
    angle = np.radians(15)
    r, z = 37 - 10 * np.tan(angle) - np.cos(angle), 65 - np.sin(angle)
    assert distance_to_nplus_mm(r, 0, z, SHAPED)[0] == pytest.approx(1.0)
    assert distance_to_nplus_mm(0, 12.5, 1.0, SHAPED)[0] != distance_to_nplus_mm(0, 12.5, 3.0, SHAPED)[0]
    assert np.isnan(distance_to_nplus_mm(0, 12.5, 1.0, SHAPED)[0]) and inside(0.0, 9.0, 1.0, SHAPED)


@pytest.mark.parametrize("kwargs", [
    {"top_taper_height_mm": 90}, {"top_taper_height_mm": 10, "top_taper_angle_deg": 90}, {"groove_depth_mm": 40},
    {"top_taper_height_mm": 80, "top_taper_angle_deg": 25}, {"groove_inner_radius_mm": 5, "groove_outer_radius_mm": 3},
    {"borehole_taper_height_mm": 60}, {"groove_outer_radius_mm": 30, "groove_depth_mm": 1},
    {"bottom_taper_height_mm": 30, "bottom_taper_angle_deg": 45},
])
def test_impossible_shapes_are_refused(kwargs):
    with pytest.raises(ConfigError):
        Crystal(**kwargs)


def test_impossible_surroundings_are_refused():
    for kwargs in ({"cup_mm": -1}, {"castle_top_mm": np.nan}, {"holder_inner_radius_mm": 60},
                   {"castle_walls_mm": (1, -1)}):
        with pytest.raises(ConfigError):
            Surroundings(**kwargs)
    for crystal in (Crystal(radius_mm=48), Crystal(height_mm=165)):
        with pytest.raises(ConfigError, match="cryostat"):
            bench_setup(crystal)
    with pytest.raises(ConfigError):
        Geometry([])


def meta(**changes):
    "A diode file in LEGEND's layout, of an invented detector."
    geometry = {"height_in_mm": 80, "radius_in_mm": 35, "borehole": {"radius_in_mm": 5, "depth_in_mm": 55},
                "groove": {"depth_in_mm": 1, "radius_in_mm": {"outer": 10, "inner": 9}},
                "pp_contact": {"radius_in_mm": 3, "depth_in_mm": 2},
                "taper": {"top": {"angle_in_deg": 8, "height_in_mm": 60},
                          "bottom": {"angle_in_deg": 0, "height_in_mm": 0},
                          "borehole": {"angle_in_deg": 0, "height_in_mm": 0}}}
    found = {"name": "V00001X", "type": "icpc", "geometry": geometry,
             "production": {"mass_in_g": 1500.0, "enrichment": {"val": 0.88, "unc": 0.01}},
             "characterization": {"manufacturer": {"dl_thickness_in_mm": 1}, "combined_0vbb_analysis": {
                 "fccd_in_mm": {"value": 0.75, "uncertainty": {"pos": 0.1, "neg": 0.2}}}}}
    return found | changes


def test_detector_from_json_and_yaml(tmp_path):
    import yaml

    (tmp_path / "a.json").write_text(json.dumps(meta()))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(meta()))
    a, b = read_detector(tmp_path / "a.json"), read_detector(tmp_path / "a.yaml")
    assert a == b and a.name == "V00001X" and a.fccd_in_mm == 0.75 and a.uncertainty_mm == (0.1, 0.2)
    c = a.crystal
    assert (c.radius_mm, c.height_mm, c.groove_depth_mm, c.nplus_free_radius_mm) == (35, 80, 1, 10)
    assert c.top_taper_height_mm == 60 and c.top_taper_angle_deg == 8 and c.borehole_fccd_fraction == 0.5
    assert c.density_g_per_cm3 == pytest.approx(5.55, abs=0.02) and a.mass_g == 1500
    (tmp_path / "b.json").write_text(json.dumps(meta(characterization={"manufacturer": {"dl_thickness_in_mm": 0.9}})))
    assert read_detector(tmp_path / "b.json", 1.0).fccd_in_mm == 0.9
    plain = meta(type="bege", characterization={}, production={})
    del plain["geometry"]["borehole"], plain["geometry"]["taper"]
    (tmp_path / "c.json").write_text(json.dumps(plain))
    c = read_detector(tmp_path / "c.json")
    assert c.fccd_in_mm is None and c.uncertainty_mm is None and c.mass_g is None and c.crystal.borehole_radius_mm == 0
    assert c.crystal.density_g_per_cm3 == pytest.approx(5.323)


@pytest.mark.parametrize("change, where", [
    ({"type": "coax"}, "type"), ({"geometry": None}, "geometry"), ({"geometry": {"height_in_mm": 80}}, "radius_in_mm"),
    ({"geometry": {"height_in_mm": "80", "radius_in_mm": 35}}, "height_in_mm"),
    ({"geometry": {"height_in_mm": 80, "radius_in_mm": -35}}, "radius_in_mm"),
    ({"geometry": {"height_in_mm": 80, "radius_in_mm": 35, "borehole": {"radius_in_mm": 40, "depth_in_mm": 9}}},
     "Crystal"),
    ({"characterization": {"combined_0vbb_analysis": {"fccd_in_mm": {"value": "thin"}}}}, "fccd_in_mm"),
    ({"name": None}, "name"),
])
def test_wrong_metadata_is_refused(tmp_path, change, where):
    (tmp_path / "a.json").write_text(json.dumps(meta(**change)))
    with pytest.raises(DataError, match=where):
        read_detector(tmp_path / "a.json")


def test_unreadable_metadata_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("{a: [")
    (tmp_path / "b.yaml").write_text("just words")
    for name in ("a.yaml", "b.yaml", "missing.yaml"):
        with pytest.raises(DataError):
            read_detector(tmp_path / name)


def test_lead_glows():
    lead = fluorescence("lead")
    below, above = (np.interp(e, lead.energy_keV, lead.probability[0]) for e in (87.9, 100.0))
    assert below < 0.05 and above == pytest.approx(0.95 * 0.78, abs=0.04)
    assert lead.lines[0][0][:2] == pytest.approx([74.97, 72.80], abs=0.02)
    assert len(fluorescence("polyethylene").lines) == 0 and len(fluorescence("EN AW-2011").lines) == 3
    n, rng = 20_000, np.random.default_rng(5)
    down = np.tile([[0.0], [0.0], [-1.0]], n)
    photons = Photons(np.arange(n), np.full(n, 120.0), np.tile([[1.0], [0.0], [50.0]], n), down)
    block = Geometry([Box("Ge", (-90, -90, 60), (90, 90, 160)), Box("lead", (-90, -90, 0), (90, 90, 40))])
    event, edep, position = track(photons, block, rng)
    total = np.bincount(event, edep)
    k_alpha = ((total > 72.5) & (total < 75.5)).sum()
    assert k_alpha > 4 * ((total > 76) & (total < 79)).sum() and (position[2] >= 60).all()


def test_flight_follows_beer_and_lambert():
    n = 40_000
    solids = [Cone("EN AW-2011", 0, 1.5, 9, 9), Box("polyethylene", (-9, -9, -2), (9, 9, -1)),
              Cone("vacuum", -9, 5, 9, 9)]
    down = np.tile([[0.0], [0.6], [-0.8]], n)
    photons = Photons(np.arange(n), np.full(n, 60.0), np.tile([[0.0], [0.0], [3.0]], n), down)
    met, material = fly(photons, Geometry(solids), np.random.default_rng(6))
    alloy, plastic = (cross_sections(m).total(60.0) for m in ("EN AW-2011", "polyethylene"))
    expected = np.exp(-(alloy * 1.5 + plastic) / 0.8)
    assert 1 - len(met) / n == pytest.approx(expected, abs=4 * np.sqrt(expected / n))
    z = met.position_mm[2]
    assert np.where(material == 0, (z >= 0) & (z <= 1.5), (z >= -2) & (z <= -1)).all()


def test_both_paths_agree_without_surroundings():
    n = 150_000
    fast = simulate_hits(n, Setup(), seed=1)
    full = simulate_hits(n, Setup(source_radius_mm=1e-3), seed=1)
    for low, high in ((0, 20), (20, 60), (60, 100), (100, 340), (340, 360), (370, 450)):
        a, b = (np.histogram(np.bincount(h.index, h.edep_keV), [low, high])[0][0] for h in (fast, full))
        assert abs(a - b) < 4 * np.sqrt(a + b) + 0.02 * a, (low, high, a, b)


def test_bench_adds_what_surrounds_the_crystal():
    n = 60_000
    bare = simulate_hits(n, Setup(bench_setup().crystal, source_to_endcap_mm=78.5, endcap_to_crystal_mm=8.0), seed=2)
    bench = simulate_hits(n, bench_setup(), seed=2)
    again = [simulate_hits(5000, bench_setup(), seed=2) for _ in range(2)]
    assert np.array_equal(again[0].edep_keV, again[1].edep_keV) and np.array_equal(again[0].event, again[1].event)
    a, b = (np.bincount(h.index, h.edep_keV) for h in (bare, bench))
    assert ((b > 56) & (b < 76)).sum() > 2 * ((a > 56) & (a < 76)).sum()  # scattered in lead, and its X-rays
    assert ((b > 210) & (b < 260)).sum() > 1.4 * ((a > 210) & (a < 260)).sum()
    peak = [np.isclose(t, 356.013, atol=0.01).sum() for t in (a, b)]
    assert peak[1] == pytest.approx(peak[0], abs=5 * np.sqrt(sum(peak)) + 0.03 * peak[0])
    assert np.isfinite(bench.distance_to_nplus_mm).all()


def test_x_rays_after_conversion():
    energy = [sample_decays(100_000, np.random.default_rng(0), on)[1] for on in (True, False)]
    xrays = [(e < 40).sum() for e in energy]
    assert xrays[1] / 100_000 == pytest.approx(0.894 * (0.8555 * 0.672 + 0.1445 * 0.773), rel=0.02)
    assert xrays[0] / xrays[1] == pytest.approx(1.98, rel=0.05)
    assert (energy[0] > 40).sum() == (energy[1] > 40).sum()


def test_crystal_volumes_of_a_plain_crystal():
    assert [(c.material, c.r_low) for c in crystal_volumes(Crystal())] == [("vacuum", 5.0), ("Ge", 40.3)]
