//! The client of OCI and Docker registries.
//!
//! It is blocking and runs in an unprivileged helper process, because a registry's bytes are
//! hostile. Everything that it needs comes with its [`Settings`]: it opens no file and reads no
//! environment variables. It does not create sockets either: a [`Dial`] resolves names, refuses
//! addresses that a registry must not direct fcd to, and makes the connections.
//!
//! [`Client`] fetches manifests and blobs of one repository. Its methods need `&mut self`, because
//! it keeps the token that the registry has given it. A clone shares the pool of connections and
//! starts with the same token, so each thread gets a clone of its own.
//!
//! ```text
//! Client ─ Session: authentication, redirects, retries ─ Http: one exchange ─ ureq, rustls
//!    │        │ challenge, auth        │ redirect           │ transport: poll, cancel, pace
//!    └ Blob: reads, resumes            └ url, address       └ proxy ─ Dial
//! ```
//!
//! Every wait has a deadline and ends when the token [`Cancel`](crate::locks::Cancel) fires. Every
//! body has a limit. No decision depends on a human-readable text of a registry, and no credential
//! is sent to a host that is neither the registry nor its configured or well-known token server.

mod address;
mod auth;
mod blob;
mod challenge;
mod client;
mod dial;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod http;
mod proxy;
mod redirect;
mod reply;
mod session;
mod settings;
#[cfg(test)]
mod tests;
mod transport;
mod url;

pub use client::{Client, Selector};
pub use dial::SystemDialer;
pub use proxy::Proxies;
pub use settings::{Repository, Settings, TokenServer};

#[cfg(test)]
use {
    client::Manifest,
    dial::{Dial, Reach, Target},
    settings::Limits,
};
