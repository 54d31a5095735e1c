//! Tests with real bridges, taps and rules in network namespaces. They need root.

mod host;
pub(super) mod lab;
mod packets;
