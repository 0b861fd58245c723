"""Measurements: throughput, kernels, pipelines, scaling, profiles, ablations and their report."""
