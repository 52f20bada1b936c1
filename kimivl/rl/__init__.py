"""Reinforcement learning: problems, rollouts, rewards, objectives, samplers. It knows neither Lightning nor the model.

Shape legend of this room: ``B`` problems, ``G`` responses of one problem, ``R`` = B * G responses, ``K`` supervised
tokens of a pack.
"""
