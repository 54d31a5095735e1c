//! The only place that starts threads. Every thread has a name and a small stack.

use crate::error::{Error, Kind, Result};
pub use crate::sched::JoinHandle;

pub const STACK_BYTES: usize = 512 * 1024;

/// Starts a named thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    crate::sched::spawn(name, STACK_BYTES, body)
        .map_err(|e| Error::new(Kind::Exhausted, format!("start thread {name}")).with_source(e))
}

/// Starts a named thread that may borrow from its scope.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    name: &str,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Result<std::thread::ScopedJoinHandle<'scope, T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn_scoped(scope, body)
        .map_err(|e| Error::new(Kind::Exhausted, format!("start thread {name}")).with_source(e))
}
