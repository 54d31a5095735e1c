//! The reasons that QEMU gives for its end.

/// The reason that a VMM gives for its end: QEMU's `ShutdownCause` (qapi/run-state.json).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    GuestShutdown,
    GuestReset,
    GuestPanic,
    /// A signal, a command or an error on the host, but not the guest.
    Host(&'static str),
}

impl Cause {
    /// Parses QEMU's name of a cause. Returns None for an unknown name and for causes that do not
    /// end the VMM.
    pub(super) fn parse(name: &str) -> Option<Self> {
        const OF_HOST: [&str; 5] = [
            "host-error",
            "host-qmp-quit",
            "host-qmp-system-reset",
            "host-signal",
            "host-ui",
        ];
        match name {
            "guest-shutdown" => Some(Cause::GuestShutdown),
            "guest-reset" => Some(Cause::GuestReset),
            "guest-panic" => Some(Cause::GuestPanic),
            _ => OF_HOST
                .into_iter()
                .find(|known| *known == name)
                .map(Cause::Host),
        }
    }

    /// Parses a number of `ShutdownCause`. Returns None in the same cases as [`Cause::parse`].
    pub(super) fn from_number(number: usize) -> Option<Self> {
        const NAMES: [&str; 9] = [
            "none",
            "host-error",
            "host-qmp-quit",
            "host-qmp-system-reset",
            "host-signal",
            "host-ui",
            "guest-shutdown",
            "guest-reset",
            "guest-panic",
        ];
        NAMES.get(number).and_then(|name| Self::parse(name))
    }
}
