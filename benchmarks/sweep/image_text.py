def image_text_samples(model, kind):
    raise NotImplementedError
