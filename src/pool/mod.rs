//! The worker pool and boot admission.
