"""Stands in for torch in the ranks of `rank_program`: what they wait in has torch's place in a stack."""
