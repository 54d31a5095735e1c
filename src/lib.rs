//! Development sandboxes in microVMs on one Linux host. ARCHITECTURE.md describes the modules.
//!
//! A module may import modules of lower layers only; `tests/it/layers.rs` checks this.

// This lint needs the fakes, because without them the items in `testing` are unreachable too.
#![cfg_attr(all(feature = "fakes", not(feature = "sim")), warn(unreachable_pub))]
// A simulation has no command line, so what only that calls is dead.
#![cfg_attr(feature = "sim", allow(dead_code, unused_imports))]

// Layer 0: base.
mod config;
mod error;
mod host;
mod ids;
mod locks;
mod sched;
mod uids;
mod undo;
// Layer 1: wire.
mod api;
// Layer 2: mechanisms, which never import each other.
mod disk;
mod guest;
mod image;
mod net;
mod ops;
mod pool;
mod session;
mod store;
mod vmm;
mod workspace;
// Layer 3: composition.
mod daemon;
// Layer 4: edges.
#[cfg(not(feature = "sim"))]
mod cli;
mod client;
mod server;

/// The functions that the programs `fcd` and `fcctl` call.
pub mod program {
    #[cfg(not(feature = "sim"))]
    pub use crate::cli::{main as fcctl, manual::page as man_page};
    pub use crate::config::{Config, Flags, reference as config_reference};
    pub use crate::daemon::helpers::run_if_asked as run_helper_if_asked;
    pub use crate::host::inherited::close_descriptors;
    pub use crate::host::{log, memory};
    pub use crate::server::{exit_status, print_doctor, run};
}

/// The items that the tests in `tests/` use.
#[cfg(any(feature = "fakes", feature = "fuzz", feature = "lock-code"))]
#[doc(hidden)]
pub mod testing {
    pub mod api {
        pub use crate::api::*;
    }
    #[cfg(not(feature = "sim"))]
    pub mod cli {
        pub use crate::cli::*;
    }
    pub mod client {
        pub use crate::client::*;
    }
    pub mod config {
        pub use crate::config::*;
    }
    pub mod daemon {
        pub use crate::daemon::*;
    }
    pub mod disk {
        pub use crate::disk::*;
    }
    pub mod error {
        pub use crate::error::*;
    }
    pub mod guest {
        pub use crate::guest::*;
    }
    pub mod host {
        pub use crate::host::*;
    }
    pub mod ids {
        pub use crate::ids::*;
    }
    pub mod image {
        pub use crate::image::*;
    }
    pub mod locks {
        pub use crate::locks::*;
    }
    pub mod net {
        pub use crate::net::*;
    }
    pub mod ops {
        pub use crate::ops::*;
    }
    pub mod pool {
        pub use crate::pool::*;
    }
    pub mod sched {
        pub use crate::sched::*;
    }
    pub mod server {
        pub use crate::server::*;
    }
    pub mod store {
        pub use crate::store::*;
    }
    pub mod uids {
        pub use crate::uids::*;
    }
    pub mod vmm {
        pub use crate::vmm::*;
    }
    pub mod workspace {
        pub use crate::workspace::*;
    }
}
