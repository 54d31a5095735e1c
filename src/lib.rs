//! Development sandboxes in microVMs on one Linux host. ARCHITECTURE.md describes the modules.
//!
//! A module may import modules of lower layers only; `tests/it/layers.rs` checks this.

// Layer 0: base.
pub mod config;
pub mod error;
pub mod host;
pub mod ids;
pub mod locks;
pub mod uids;
pub mod undo;
// Layer 1: wire.
pub mod api;
// Layer 2: mechanisms, which never import each other.
pub mod disk;
pub mod guest;
pub mod image;
pub mod net;
pub mod ops;
pub mod pool;
pub mod session;
pub mod store;
pub mod vmm;
pub mod workspace;
// Layer 3: composition.
pub mod daemon;
// Layer 4: edges.
pub mod cli;
pub mod client;
pub mod server;
