import numpy as np

from cogcommon.model.checkpoint import open_checkpoint
from workshop.pretrain.captions import strange_caption, unknown_words
from workshop.scenes import NEW_MOTIONS, every_scene


def test_strange_captions_keep_some_of_the_scene_and_nothing_of_what_is_to_be_taught():
    vocabulary = frozenset(open_checkpoint("random-tiny").load_tokenizer().get_vocab())
    words, rng = unknown_words(vocabulary), np.random.default_rng(0)
    assert len(words) > 500
    scenes = every_scene(0)
    captions = [strange_caption(scene, rng, words) for scene in scenes]
    assert not {scene.caption for scene in scenes} & set(captions)
    kept = [[part in caption for part in (s.shape, s.motion)] for s, caption in zip(scenes, captions, strict=True)]
    shapes, motions = np.mean(kept, axis=0)
    assert shapes > 0.8 and 0.1 < motions < 0.5
    new = {word for motion in NEW_MOTIONS for word in motion.split()} - {"slowly", "circles", "around", "the", "centre"}
    said = {word for caption in captions for word in caption.split()}
    assert new == {"shrinks", "back"} and not (new | {"sks", "star"}) & said
