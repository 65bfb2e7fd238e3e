"""The paper's whole study on pooled data, without Flower and Ray: `python -m fedunlearn.study dataset=cifar10`."""
