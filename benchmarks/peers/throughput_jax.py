"""PPO on CartPole jitted whole in JAX, in the manner of PureJaxRL: `SEEDS ROLLOUTS [DEVICES [PLATFORM]]` -> JSON.

4 environments x 128 steps, 4 epochs x 4 minibatches, 2 x 64 tanh for policy and value each, Adam, gradients clipped at
0.5: what fnrl's side does. Seeds are `jax.vmap`, and over several host DEVICES `jax.shard_map` of it. XLA takes as many
threads as it likes; on a GPU, products are of float32 as fnrl's are, not of TF32.
"""

import json
import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=" + (*sys.argv[3:], "1")[0]
os.environ["JAX_PLATFORMS"] = (*sys.argv[4:], "cpu")[0]

import jax
import jax.numpy as jnp
import optax

ENVS, STEPS, EPOCHS, MINIBATCHES = 4, 128, 4, 4
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
OPTIMISER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2.5e-4, eps=1e-5))


def network(key, out, gain):
    sizes, keys = (4, 64, 64, out), jax.random.split(key, 3)
    gains = (2.0**0.5, 2.0**0.5, gain)
    make = [
        jax.nn.initializers.orthogonal(g)(k, (i, o))
        for k, g, i, o in zip(keys, gains, sizes[:-1], sizes[1:], strict=True)
    ]
    return [(w, jnp.zeros(w.shape[1])) for w in make]


def forward(layers, x):
    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = layers[-1]
    return x @ w + b


def reset(key):
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.int32(0)


def step_env(key, state, action):
    """One step of CartPole-v1, with its next episode begun where one ended."""
    (x, v, theta, w), steps = state
    force = jnp.where(action == 1, 10.0, -10.0)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    temp = (force + 0.05 * w**2 * sin) / 1.1
    alpha = (9.8 * sin - cos * temp) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    acc = temp - 0.05 * alpha * cos / 1.1
    physics, steps = jnp.stack([x + 0.02 * v, v + 0.02 * acc, theta + 0.02 * w, w + 0.02 * alpha]), steps + 1
    done = (jnp.abs(physics[0]) > 2.4) | (jnp.abs(physics[2]) > 12 * 2 * jnp.pi / 360) | (steps >= 500)
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), reset(key), (physics, steps)), jnp.float32(1.0), done


def init(key):
    policy, value, env, rest = jax.random.split(key, 4)
    params = {"policy": network(policy, 2, 0.01), "value": network(value, 1, 1.0)}
    return params, OPTIMISER.init(params), jax.vmap(reset)(jax.random.split(env, ENVS)), rest


def loss(params, batch):
    obs, action, old_logp, advantage, target = batch
    logits = jax.nn.log_softmax(forward(params["policy"], obs))
    value = forward(params["value"], obs)[:, 0]
    logp = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
    ratio = jnp.exp(logp - old_logp)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    entropy = -(jnp.exp(logits) * logits).sum(-1)
    value_loss = 0.5 * jnp.square(value - target)
    return -surrogate.mean() + VALUE * value_loss.mean() - ENTROPY * entropy.mean()


def rollout(carry, _):
    def act(carry, _):
        env, key = carry
        key, sample, step = jax.random.split(key, 3)
        obs = env[0]
        logits = jax.nn.log_softmax(forward(params["policy"], obs))
        value = forward(params["value"], obs)[:, 0]
        action = jax.random.categorical(sample, logits)
        logp = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        env, reward, done = jax.vmap(step_env)(jax.random.split(step, ENVS), env, action)
        return (env, key), (obs, action, logp, value, reward, done)

    params, opt, env, key = carry
    (env, key), (obs, action, logp, value, reward, done) = jax.lax.scan(act, (env, key), None, STEPS)

    def back(carry, now):
        advantage, next_value = carry
        value, reward, done = now
        delta = reward + GAMMA * next_value * (1 - done) - value
        advantage = delta + GAMMA * LAMBDA * (1 - done) * advantage
        return (advantage, value), advantage

    last = forward(params["value"], env[0])[:, 0]
    _, advantage = jax.lax.scan(back, (jnp.zeros_like(last), last), (value, reward, done), reverse=True)
    data = (obs, action, logp, advantage, advantage + value)
    data = jax.tree.map(lambda x: x.reshape(ENVS * STEPS, *x.shape[2:]), data)

    def epoch(carry, _):
        def update(carry, batch):
            params, opt = carry
            grads = jax.grad(loss)(params, batch)
            moves, opt = OPTIMISER.update(grads, opt, params)
            return (optax.apply_updates(params, moves), opt), None

        params, opt, key = carry
        key, shuffle = jax.random.split(key)
        order = jax.random.permutation(shuffle, ENVS * STEPS)
        batches = jax.tree.map(lambda x: x[order].reshape(MINIBATCHES, -1, *x.shape[1:]), data)
        (params, opt), _ = jax.lax.scan(update, (params, opt), batches)
        return (params, opt, key), None

    (params, opt, key), _ = jax.lax.scan(epoch, (params, opt, key), None, EPOCHS)
    return (params, opt, env, key), done.sum()


jax.config.update("jax_default_matmul_precision", "highest")
seeds, rollouts, devices = (*map(int, sys.argv[1:4]), 1)[:3]
run = jax.vmap(lambda carry: jax.lax.scan(rollout, carry, None, rollouts))
carry = jax.vmap(init)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
if devices > 1:
    mesh, split = jax.make_mesh((devices,), ("seeds",)), jax.sharding.PartitionSpec("seeds")
    run = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    carry = jax.device_put(carry, jax.sharding.NamedSharding(mesh, split))
run = jax.jit(run)
begin = time.perf_counter()
carry, ended = jax.block_until_ready(run(carry))
first = time.perf_counter() - begin
carry, ended = jax.block_until_ready(run(carry))  # what it has returned lies elsewhere than what it was first given
begin, cpu = time.perf_counter(), time.process_time()
carry, ended = jax.block_until_ready(run(carry))
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps({"steps": seeds * ENVS * STEPS * rollouts, "seconds": seconds, "cpu": cpu, "first": first}))
