"""The gate that rendered data must pass: what a linear classifier makes of colour alone, or of area and position alone.

If those reach more than 1.5 times chance, the classes leak through something other than outline and texture.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def colour(images: NDArray[np.uint8]) -> F64:
    """Mean and standard deviation of each channel.

    Args:
        images: `(N, 3, H, W)` uint8.

    Returns:
        `(N, 6)` in [0, 1].
    """
    flat = images.reshape(len(images), 3, -1) / 255.0
    return np.concatenate([flat.mean(-1), flat.std(-1)], axis=1)


def area_position(objects: list[list[dict[str, Any]]]) -> F64:
    """Visible area and centre of the box of each image's first object.

    Args:
        objects: COCO objects of each image.

    Returns:
        `(N, 3)` pixels^2 and pixels; zeros where an image has no object.
    """
    rows = []
    for found in objects:
        x, y, w, h = found[0]["bbox"] if found else (0, 0, 0, 0)
        rows.append([found[0]["area"] if found else 0.0, x + w / 2, y + h / 2])
    return np.array(rows, np.float64)


def linear_accuracy(
    train: F64, train_labels: NDArray[np.int64], test: F64, test_labels: NDArray[np.int64], steps: int = 300
) -> float:
    """Test accuracy of softmax regression on standardised features.

    Args:
        train: `(N, F)` features.
        train_labels: `(N,)`.
        test: `(M, F)` features.
        test_labels: `(M,)`.
        steps: Full-batch gradient steps.

    Returns:
        Share of right answers in [0, 1].
    """
    mean, scale = train.mean(0), train.std(0) + 1e-9
    x = np.concatenate([(train - mean) / scale, np.ones((len(train), 1))], 1)
    y = np.concatenate([(test - mean) / scale, np.ones((len(test), 1))], 1)
    classes = int(train_labels.max()) + 1
    truth = np.eye(classes)[train_labels]
    weight = velocity = np.zeros((x.shape[1], classes))
    for _ in range(steps):
        logits = x @ weight
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        velocity = 0.9 * velocity + x.T @ (share - truth) / len(x)
        weight = weight - velocity
    return float((np.argmax(y @ weight, 1) == test_labels).mean())
