//! With real bridges, taps and rules, in network namespaces of the tests' own: root only.

mod host;
pub(super) mod lab;
mod packets;
