"""Equations of the classic control tasks, once for every backend: gymnasium 1.4's, in its order.

A step takes the numbers of a state and the action, all float64, and returns the numbers of the next
state, the reward, and whether the episode has ended; features are those of the observation. As they
stand here these functions compute batches in torch. Numba and Triton compile the same text (by
`formulas`), with functions of theirs under the names that it calls: ``ceil``, ``cos``, ``floor``,
``remainder``, ``sin``, ``where``; ``clamp``, which keeps a NaN; ``exact``, around a literal that is
compared.

Results differ in the last bit of a sine or cosine alone, as long as every backend rounds each
product and each sum: no ``fastmath`` in Numba, ``fp_fusion=False`` in Triton, parentheses as here.

Sources: CartPole from Barto, Sutton and Anderson 1983; Acrobot from Sutton 1996, in the version of
Sutton and Barto's book; MountainCar from Moore 1990; Pendulum from gymnasium.
"""

from __future__ import annotations

import math

from torch import ceil, cos, floor, remainder, sin, where

PI, TURN, ANGLE_LIMIT = math.pi, 2 * math.pi, 12 * 2 * math.pi / 360


def exact(value):
    return value


def clamp(x, low, high):
    return x.clamp(low, high)


def cartpole_step(x, x_dot, theta, theta_dot, action):
    force = 20.0 * action - 10.0
    c, s = cos(theta), sin(theta)
    # Masses 1.0 + 0.1, half length 0.5, gravity 9.8, 0.02 s of explicit Euler.
    push = (force + 0.05 * (theta_dot * theta_dot) * s) / 1.1
    theta_acc = (9.8 * s - c * push) / (0.5 * (4.0 / 3.0 - 0.1 * (c * c) / 1.1))
    x_acc = push - 0.05 * theta_acc * c / 1.1
    x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
    theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
    outside = (x < exact(-2.4)) | (x > exact(2.4))
    terminated = outside | (theta < exact(-ANGLE_LIMIT)) | (theta > exact(ANGLE_LIMIT))
    # A constant as `where` makes it has the shape of the others, on every backend.
    return x, x_dot, theta, theta_dot, where(terminated, 1.0, 1.0), terminated


def cartpole_features(x, x_dot, theta, theta_dot):
    return x, x_dot, theta, theta_dot


def acrobot_accelerations(theta1, theta2, rate1, rate2, torque):
    c2, s2 = cos(theta2), sin(theta2)
    # Both links: mass 1, length 1, centre of mass at 0.5, moment of inertia 1.
    d1 = 0.25 + (1.25 + c2) + 2.0
    d2 = (0.25 + 0.5 * c2) + 1.0
    phi2 = 0.5 * 9.8 * cos(theta1 + theta2 - PI / 2)
    phi1 = (
        -0.5 * (rate2 * rate2) * s2 - rate2 * rate1 * s2 + 1.5 * 9.8 * cos(theta1 - PI / 2) + phi2
    )
    acc2 = (torque + d2 / d1 * phi1 - 0.5 * (rate1 * rate1) * s2 - phi2) / (1.25 - d2 * d2 / d1)
    return -(d2 * acc2 + phi1) / d1, acc2


def wrap(angle):
    """Moved into ``[-pi, pi]`` by whole turns; an angle already inside keeps its bits."""
    above = ceil((angle - PI) / TURN)
    below = floor((angle + PI) / TURN)
    turns = where(above < 0.0, 0.0, above) + where(below > 0.0, 0.0, below)
    return angle - turns * TURN


def acrobot_step(a, b, c, d, action):
    torque = action - 1.0
    # One Runge-Kutta step of 0.2 s: angles a and b, their rates c and d.
    c1, d1 = acrobot_accelerations(a, b, c, d, torque)
    a2, b2 = c + 0.1 * c1, d + 0.1 * d1
    c2, d2 = acrobot_accelerations(a + 0.1 * c, b + 0.1 * d, a2, b2, torque)
    a3, b3 = c + 0.1 * c2, d + 0.1 * d2
    c3, d3 = acrobot_accelerations(a + 0.1 * a2, b + 0.1 * b2, a3, b3, torque)
    a4, b4 = c + 0.2 * c3, d + 0.2 * d3
    c4, d4 = acrobot_accelerations(a + 0.2 * a3, b + 0.2 * b3, a4, b4, torque)
    theta1 = wrap(a + 0.2 / 6.0 * (c + 2.0 * a2 + 2.0 * a3 + a4))
    theta2 = wrap(b + 0.2 / 6.0 * (d + 2.0 * b2 + 2.0 * b3 + b4))
    rate1 = clamp(c + 0.2 / 6.0 * (c1 + 2.0 * c2 + 2.0 * c3 + c4), -4 * PI, 4 * PI)
    rate2 = clamp(d + 0.2 / 6.0 * (d1 + 2.0 * d2 + 2.0 * d3 + d4), -9 * PI, 9 * PI)
    terminated = -cos(theta1) - cos(theta2 + theta1) > 1.0
    return theta1, theta2, rate1, rate2, where(terminated, 0.0, -1.0), terminated


def acrobot_features(theta1, theta2, rate1, rate2):
    return cos(theta1), sin(theta1), cos(theta2), sin(theta2), rate1, rate2


def mountain_car_step(position, velocity, action):
    velocity = velocity + ((action - 1.0) * 0.001 + cos(3.0 * position) * -0.0025)
    velocity = clamp(velocity, -0.07, 0.07)
    position = clamp(position + velocity, -1.2, 0.6)
    velocity = where((position == exact(-1.2)) & (velocity < 0.0), 0.0, velocity)
    terminated = (position >= 0.5) & (velocity >= 0.0)
    return position, velocity, where(terminated, -1.0, -1.0), terminated


def mountain_car_features(position, velocity):
    return position, velocity


def pendulum_step(theta, theta_dot, action):
    torque = clamp(action, -2.0, 2.0)
    angle = remainder(theta + PI, TURN) - PI
    cost = angle * angle + 0.1 * (theta_dot * theta_dot) + 0.001 * (torque * torque)
    # Gravity 10, mass 1, length 1, 0.05 s of semi-implicit Euler.
    theta_dot = clamp(theta_dot + (15.0 * sin(theta) + 3.0 * torque) * 0.05, -8.0, 8.0)
    theta = theta + theta_dot * 0.05
    # No state ends an episode, not even NaN.
    return theta, theta_dot, -cost, theta < theta


def pendulum_features(theta, theta_dot):
    return cos(theta), sin(theta), theta_dot


EQUATIONS = (
    cartpole_step,
    cartpole_features,
    acrobot_accelerations,
    wrap,
    acrobot_step,
    acrobot_features,
    mountain_car_step,
    mountain_car_features,
    pendulum_step,
    pendulum_features,
)
CONSTANTS = {"PI": PI, "TURN": TURN, "ANGLE_LIMIT": ANGLE_LIMIT}
