"""Few-shot organ segmentation of CT on a hospital workstation.

Every command of the command line has a function here with the same name. A function is imported when it is first used::

    from pathlib import Path

    import fseft_edge

    fseft_edge.export_encoder(None, model="edge_base", output=Path("edge_base.encoder"))
    liver = fseft_edge.OrganLabel("liver", 6)
    fseft_edge.adapt(Path("edge_base.encoder"), images, labels, [liver], Path("liver.adapter"))
    fseft_edge.segment([Path("ct.nii.gz")], [Path("liver.adapter")], Path("out"))
"""

from lazy_loader import attach_stub

from fseft_edge._version import __version__ as __version__

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
