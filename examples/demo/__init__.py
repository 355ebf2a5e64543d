"""The main job on real input: a store under load, refusals, real pressure, snapshots, a kill, a restore."""
