//! Images: building, registry on disk, kernels.
