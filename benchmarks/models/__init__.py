"""Real data and trained models, one module each, for tests and benchmarks: nothing here ships in the wheel.

    data            the texts and images of ../shared/data, DataMissing where they are absent
    minilm          BERT sentence encoder, 22.7 M parameters    Spearman on STS-B
    stories         Llama-style decoder, 260 K parameters       nats/token on TinyStories, greedy text
    vit_mnist       vision transformer                          accuracy on MNIST
    resnet_cifar10  ResNet-20                                   accuracy on CIFAR-10
    grokking        1-layer transformer, a + b mod 113          sums right, of all 12,769

Each model module has `model()`, a metric of any callable `run` which stands for the model, compressed or
not, and `DYNAMIC`, the `dynamic_shapes` under which `torch.export.export` captures it.
"""
