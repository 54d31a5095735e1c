//! Reports resources that fcd left on the host.

use crate::api::daemon::Leak;
use crate::error::{Error, Result};

/// Describes a leftover resource. If its removal was attempted, the report contains the result,
/// which is also logged.
pub(super) fn leak(kind: &str, name: &str, why: &str, removed: Option<&Result<()>>) -> Leak {
    let error = removed.and_then(|r| r.as_ref().err()).map(Error::to_string);
    match (removed, &error) {
        (Some(_), None) => log::info!("removed a leftover: {kind} {name}: {why}"),
        (Some(_), Some(e)) => log::warn!("a leftover could not be removed: {kind} {name}: {e}"),
        (None, _) => {}
    }
    Leak {
        kind: kind.to_owned(),
        name: name.to_owned(),
        why: why.to_owned(),
        removed: removed.is_some_and(|r| r.is_ok()),
        error,
    }
}
