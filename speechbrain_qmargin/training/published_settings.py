"""What a published model says of the experiment that starts from it, before that is composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speechbrain_qmargin.published import as_option, load_published
from speechbrain_qmargin.training.layout import is_run

__all__ = ["published_overrides"]


def published_overrides(settings: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """The settings that build a published network and its features, as a command line has them.

    Parameters
    ----------
    settings : mapping
        Of the experiment: ``pretrained`` names a file or folder, a run, or nothing.
    given : mapping from str to str
        What the command line says, as YAML.

    Returns
    -------
    dict from str to str
        Empty where nothing published is named.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`~speechbrain_qmargin.published.load_published`: it is loaded once, so that what
        is wrong with it is said before the data are prepared. A face network for a speech recipe,
        or the other way round; a setting on the command line that is not the model's.

    Examples
    --------
    >>> import torch
    >>> from speechbrain_qmargin.models.iresnet import IResNet
    >>> path = getfixture("tmp_path") / "backbone.pth"
    >>> torch.save(IResNet(18, embedding_dim=8, channels=4).state_dict(), path)
    >>> overrides = published_overrides({"pretrained": str(path)}, {})
    >>> overrides["model"], overrides["depth"], overrides["embedding_dim"]
    ('iresnet', '18', '8')
    """
    source = settings.get("pretrained")
    if source is None or is_run(source):
        return {}
    try:
        published = load_published(source)
    except ValueError as error:
        raise ValueError(
            f"pretrained: no run (no experiment.yaml or save/ in it), and {error}"
        ) from None
    if "n_mels" in settings:
        published.speech()
    else:
        published.faces()
    for key, value in published.settings.items():
        if key in given and given[key].strip() not in (as_option(value), str(value)):
            raise ValueError(
                f"--{key} {given[key]}: {source} is {published.format}'s {published.network}, with "
                f"{key} {as_option(value)}; leave --{key} out"
            )
    return {key: as_option(value) for key, value in published.settings.items()}
