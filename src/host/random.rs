//! Random bytes from the kernel.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Returns `N` random bytes. Waits until the kernel's pool is seeded, early in the host's boot.
///
/// # Panics
/// Panics if getrandom(2) fails. Without flags, getrandom(2) fails only for a bad address, or in a
/// kernel or a sandbox without that call.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if crate::sched::fill_random(&mut bytes) {
        return bytes;
    }
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(e) => panic!("getrandom: {e}"),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_filled_and_differ() {
        // getrandom(2) may return fewer bytes than this in one call.
        let (one, other) = (bytes::<1024>(), bytes::<1024>());
        assert_ne!(one, other);
        assert!(one[1008..].iter().any(|b| *b != 0));
        assert!(bytes::<0>().is_empty());
    }
}
