# SPDX-License-Identifier: Apache-2.0
"""Families of weights, one file each: the origin of a network and its names in other code.

A family is a module with

  owns(vit, decoder)      whether our encoder, with this decoder or None, belongs to the family
  read(found)             fields of `layouts.Weights` of a set of tensors (`shapes.Found`), None if
                          they are of another family
  rows(w)                 renames of `Weights`, see `tables`
  refusals(w)             {(layout, what): '' or one sentence why it cannot leave so}
  hf_class(w)             the class of transformers that holds them
  hf_config(w)            its config.json, beside what `layouts` writes for all
  timm_model(w)           (architecture of timm, its arguments), beside those of all
  method(w, hints)        (name, fields) of the method that the whole weights belong to, None for an
                          encoder alone
  processor               mean and std of its images, where they are not ImageNet's

and, where it needs them:

  claims(w)               whether the networks beside the encoder have names of this family; the
                          encoder may belong to another
  NETWORKS                {name: class} of the networks beside an encoder that it has names for
  INNER                   (prefix of the encoder, a key beside it) of whole weights in transformers
  rename(w, key)          the name in the tables of a key of the file, None for a buffer
  buffers(w)              tensors of the official layout that are no parameters
  check(w, state_dict)    raises ValueError if a file contradicts its names
  parts(w, state_dict)    {name in the tables: array} of what one tensor of the file holds together;
                          `rename` gives None for such a tensor
  joined(w, tensors)      its inverse: the tensors of a file of those that the tables name
  foreign(hints, shapes)  '' or in words what close relatives are that are not read: 'those of X'
  LICENCE                 a sentence on the licence of published weights, for imports and the model
                          cards of what is made from them
  usage(w)                lines of Python that load an export, None for the common ones
"""

import importlib
import pkgutil


def all_families() -> list:
    """The families by their ORDER, the most specific first."""
    modules = [get(m.name) for m in pkgutil.iter_modules(__path__)]
    return sorted(modules, key=lambda module: module.ORDER)


def get(name: str):
    """The family `name`."""
    return importlib.import_module(f'{__name__}.{name}')


def of(vit, decoder=None) -> str:
    """The name of the family that a ViT is an instance of."""
    return next(f.__name__.rpartition('.')[2] for f in all_families() if f.owns(vit, decoder))
