"""Stages that go on from a pre-trained model."""
