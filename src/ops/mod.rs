//! The operation registry.
