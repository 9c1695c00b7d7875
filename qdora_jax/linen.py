"""The door for other people's Linen models: their code stays as it is.

A model made of nn.Dense, nn.DenseGeneral (and so of Flax's attention), nn.Conv
and nn.Embed is traced once, which tells for every kernel which of its axes are
summed over. `layout.kernels` then lays each out as [I, O], and everything of
this package applies to that tree:

  layout = linen.trace(model, params, images)
  base = quantize(layout.kernels(params), QuantSpec(targets=r'.*/kernel'))
  adapter = init_adapter(key, base, AdapterSpec(targets=r'.*/kernel'))
  loss = lambda adapter: f(layout.apply(attach(base, adapter), images))
  params = layout.original(merge(base, adapter))

`layout.apply` runs the model with nn.intercept_methods: a module whose kernel
is an array runs as it is; one whose kernel is another leaf runs with `linear`
in place of its dot_general or convolution (on patches), so biases, padding and
dtypes stay its own affair.

An NNX model goes through nnx.split and nnx.merge, with `merge` inside the loss:

  graph, state = nnx.split(model)
  params = nnx.to_pure_dict(state)
  loss = lambda adapter: f(nnx.merge(graph, merge(base, adapter)), x)

The base rests in 4 bits there, too; only while a step runs is it dense.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qdora_jax import paths
from qdora_jax.linear import linear, materialize

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One module's kernel.

  Attributes:
    module: its class: 'Dense', 'DenseGeneral', 'Conv' or 'Embed'.
    into: sizes of the axes that are summed over.
    out: sizes of the others, which come last.
    stacked: layers in front of them, of an nn.scan; 0 for none.
  """

  module: str
  into: tuple[int, ...]
  out: tuple[int, ...]
  stacked: int = 0

  @property
  def lead(self) -> tuple[int, ...]:
    return (self.stacked,) if self.stacked else ()

  @property
  def flat(self) -> tuple[int, ...]:
    """[..., I, O]"""
    return (*self.lead, math.prod(self.into), math.prod(self.out))

  @property
  def original(self) -> tuple[int, ...]:
    return (*self.lead, *self.into, *self.out)


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a trace found: use `trace`.

  Attributes:
    model: the Linen module.
    found: {module's path: its kernel}.
    left: {parameter's path: why it is none}, of arrays of two axes and more.
  """

  model: nn.Module
  found: Mapping[str, Kernel]
  left: Mapping[str, str]

  def __str__(self) -> str:
    rows = [('kernel', 'module', 'in', 'out')]
    for path, k in self.found.items():
      sizes = (' x '.join(map(str, s)) for s in (k.into, k.out))
      stack = f'{k.stacked} layers of ' if k.stacked else ''
      rows.append((f'{path}/kernel', stack + k.module, *sizes))
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    lines = [
      '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
      for row in rows
    ]
    lines += [f'left alone: {path}: {why}' for path, why in self.left.items()]
    return '\n'.join(lines)

  def kernels(self, params: Tree) -> Tree:
    """The model's parameters with every kernel as [..., I, O].

    An embedding is the kernel of its module, too: [entries, features].
    """
    flat = {}
    for path, leaf in paths.flatten(params).items():
      module, _, name = path.rpartition('/')
      if module in self.found and name == _name(self.found[module]):
        shape = self.found[module].flat
        flat[f'{module}/kernel'] = leaf.reshape(shape)
      else:
        flat[path] = leaf
    return paths.unflatten(flat)

  def original(self, params: Tree) -> Tree:
    """Inverse of `kernels`, for plain arrays; other leaves stay as they are."""
    flat = {}
    for path, leaf in paths.flatten(params).items():
      module, _, name = path.rpartition('/')
      if module not in self.found or name != 'kernel':
        flat[path] = leaf
        continue
      kernel = self.found[module]
      shaped = leaf.reshape(kernel.original) if _is_array(leaf) else leaf
      flat[f'{module}/{_name(kernel)}'] = shaped
    return paths.unflatten(flat)

  def apply(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
    """model.apply with a tree of any leaves, as `attach` gives it.

    Args:
      params: tree in the layout of `kernels`.
      *args, **kwargs: of the model's apply; other collections (batch_stats)
        go in as variables={...}.

    Raises:
      ValueError: if a leaf that is no array is no known kernel's, or the model
        did not run with it: what is adapted there would be missed.
    """
    others = kwargs.pop('variables', {})
    variables = {**others, 'params': self.original(params)}
    waiting = {
      path.rpartition('/')[0]: path
      for path, leaf in paths.flatten(params).items()
      if not _is_array(leaf)
    }
    for module, path in waiting.items():
      if module not in self.found:
        why = self.left[path] if path in self.left else 'it is no kernel'
        raise ValueError(
          f'{path} is quantized or adapted, and {why}: it would be missed. '
          'Choose targets that leave it out (`layout.check` tells)'
        )
    ran: set[str] = set()
    with nn.intercept_methods(functools.partial(_run, self, ran)):
      out = self.model.apply(variables, *args, **kwargs)
    missed = [path for module, path in waiting.items() if module not in ran]
    if missed:
      raise ValueError(
        f'{missed[0]} is quantized or adapted, and the model did not run with '
        'it this time, as it did when it was traced; trace it as it is called'
      )
    return out

  def check(self, targets: str) -> None:
    """Raises ValueError if a rule matches an array that is no known kernel.

    Args:
      targets: as QuantSpec and AdapterSpec take it.
    """
    blank = paths.unflatten(
      {path: jax.ShapeDtypeStruct((1, 1), jnp.float32) for path in self.left}
    )
    try:
      hit = paths.select(blank, targets) if blank else {}
    except ValueError:
      return
    path = next(iter(hit), None)
    if path is not None:
      raise ValueError(
        f'targets={targets!r} match {path}, and {self.left[path]}: it would be '
        'missed. Expected kernels of Dense, DenseGeneral, Conv and Embed; '
        'choose targets that leave it out'
      )


def trace(model: nn.Module, params: Tree, *args: Any, **kwargs: Any) -> Layout:
  """Runs a model abstractly and notes the axes of every kernel.

  Args:
    model: any Linen module.
    params: its parameters, or their shapes.
    *args, **kwargs: an example of what its apply is called with; shapes will
      do. Other collections go in as variables={...}.

  Raises:
    ValueError: if a scan's layers are not called 'layers', by which names and
      rules know a stack.

  Example:
    >>> layout = trace(vit, params, jnp.zeros((1, 224, 224, 3)))
    >>> print(layout)
  """
  seen: dict[str, Kernel] = {}
  others = kwargs.pop('variables', {})

  def note(next_fun, call_args, call_kwargs, context):
    module = context.module
    name = type(module).__name__
    path = '/'.join(module.path)
    if type(module) in _MODULES and module.has_variable(
      'params', _leaf_name(module)
    ):
      leaf = module.get_variable('params', _leaf_name(module))
      into = _MODULES[type(module)](module, leaf)
      if into:
        seen[path] = Kernel(name, leaf.shape[:into], leaf.shape[into:])
    return next_fun(*call_args, **call_kwargs)

  def run(params, args, kwargs):
    with nn.intercept_methods(note):
      return model.apply({**others, 'params': params}, *args, **kwargs)

  jax.eval_shape(run, params, args, kwargs)
  found, left = {}, {}
  for path, leaf in paths.flatten(params).items():
    module, _, name = path.rpartition('/')
    if module in seen and name == _name(seen[module]):
      found[module] = _with_stack(path, leaf, seen[module])
    elif len(leaf.shape) > 1 and module not in seen:
      left[path] = 'no Dense, DenseGeneral, Conv or Embed ran with it'
  return Layout(model, found, left)


def _with_stack(path: str, leaf: Any, kernel: Kernel) -> Kernel:
  """The kernel with the layers that a scan put in front of it."""
  if leaf.shape == kernel.original:
    return kernel
  if leaf.shape[1:] != kernel.original or paths.STACK not in path.split('/'):
    raise ValueError(
      f'{path} is {leaf.shape}, and {kernel.module} runs with '
      f'{kernel.original}: layers of a scan are expected in front, in a module '
      f'called {paths.STACK!r}'
    )
  return dataclasses.replace(kernel, stacked=leaf.shape[0])


def _name(kernel: Kernel) -> str:
  """What the module itself calls its kernel."""
  return 'embedding' if kernel.module == 'Embed' else 'kernel'


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, 'reshape')


def _leaf_name(module: nn.Module) -> str:
  return 'embedding' if isinstance(module, nn.Embed) else 'kernel'


def _plain_general(module: nn.DenseGeneral, leaf: Any) -> int:
  axis = (
    module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
  )
  # Kernels of their own for every example of a batch are not [I, O].
  return 0 if module.batch_dims else len(axis)


def _plain_conv(module: nn.Conv, leaf: Any) -> int:
  grouped = module.feature_group_count != 1 or module.mask is not None
  return 0 if grouped else leaf.ndim - 1


# How many axes of the kernel are summed over; 0 for what is not one product.
_MODULES = {
  nn.Dense: lambda module, leaf: 1,
  nn.DenseGeneral: _plain_general,
  nn.Conv: _plain_conv,
  nn.Embed: lambda module, leaf: 1,
}


def _run(layout: Layout, ran: set[str], next_fun, args, kwargs, context) -> Any:
  """Runs one module's method, by `linear` if its kernel is no array."""
  module = context.module
  path = '/'.join(module.path)
  if path not in layout.found or type(module) not in _MODULES:
    return next_fun(*args, **kwargs)
  leaf = module.get_variable('params', _leaf_name(module))
  if _is_array(leaf):
    return next_fun(*args, **kwargs)
  ran.add(path)
  kernel = layout.found[path]
  shape = (*kernel.into, *kernel.out)
  hooks = {}
  if isinstance(module, nn.Embed):
    dense = materialize(leaf, module.param_dtype).reshape(shape)
    inside = {'embedding': dense}
  else:
    # Of the right shape, and never read.
    inside = {'kernel': jnp.zeros(shape, module.param_dtype)}
    if module.use_bias:
      inside['bias'] = module.get_variable('params', 'bias')
    product = functools.partial(_convolve, leaf, kernel)
    hooks = {
      'conv_general_dilated': product,
      'conv_general_dilated_cls': None,
    }
    if not isinstance(module, nn.Conv):
      product = functools.partial(_dot, leaf, kernel)
      hooks = {'dot_general': product, 'dot_general_cls': None}
  alone = module.clone(parent=None, name=None, **hooks)
  return alone.apply(
    {'params': inside}, *args, method=context.method_name, **kwargs
  )


def _dot(
  leaf: Any, kernel: Kernel, x: jax.Array, _: jax.Array, dims: Any, **__: Any
) -> jax.Array:
  """lax.dot_general with a leaf in the kernel's place."""
  ((axes, _), _) = dims
  x = jnp.moveaxis(x, axes, range(-len(axes), 0))
  x = x.reshape(*x.shape[: -len(axes)], -1)
  y = linear(x, leaf)
  return y.reshape(*y.shape[:-1], *kernel.out)


def _convolve(
  leaf: Any,
  kernel: Kernel,
  x: jax.Array,
  _: jax.Array,
  strides: Any,
  padding: Any,
  **options: Any,
) -> jax.Array:
  """lax.conv_general_dilated as a product of patches with a leaf."""
  *window, channels = kernel.into
  patches = jax.lax.conv_general_dilated_patches(
    x,
    window,
    strides,
    padding,
    lhs_dilation=options['lhs_dilation'],
    rhs_dilation=options['rhs_dilation'],
    dimension_numbers=options['dimension_numbers'],
    precision=jax.lax.Precision.HIGHEST,
  )
  # Patches come channel by channel, kernels have channels last.
  lead = patches.shape[:-1]
  patches = patches.reshape(*lead, channels, math.prod(window))
  return linear(jnp.swapaxes(patches, -1, -2).reshape(*lead, -1), leaf)
