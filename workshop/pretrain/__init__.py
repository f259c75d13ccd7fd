"""How the built-in model is made from nothing.

``python -m workshop.pretrain vae FOLDER`` trains the VAE on drawn clips, ``transformer FOLDER --form tiny-2b``
the transformer of one form on that VAE's latents with the project's own loss, and ``exam FOLDER`` lets the judge
name what it generates. ``concept RUN`` does so for a fine-tune of the
finished model. Every training continues where its folder was left.
"""
