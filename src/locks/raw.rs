//! The primitives that [`LockSet`](super::LockSet) and [`Cancel`](super::Cancel) are built on. They
//! come from `sched`. With the feature `shuttle` they are shuttle's models, so that its
//! scheduler controls every step.

#[cfg(not(feature = "shuttle"))]
mod imp {
    pub(crate) use crate::sched::{AtomicBool, Condvar, Mutex, Thread, ThreadId, current, park};
}

#[cfg(feature = "shuttle")]
mod imp {
    pub use shuttle::sync::atomic::AtomicBool;
    pub use shuttle::thread::{Thread, ThreadId, current, park};

    /// A mutex with parking_lot's signatures. A panic under the lock does not poison the mutex.
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);
    pub struct MutexGuard<'a, T>(Option<shuttle::sync::MutexGuard<'a, T>>);
    pub struct Condvar(shuttle::sync::Condvar);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }
        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(|e| e.into_inner())))
        }
    }
    impl<T> std::ops::Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().expect("only a wait takes the inner guard")
        }
    }
    impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("only a wait takes the inner guard")
        }
    }
    impl Condvar {
        pub fn new() -> Self {
            Self(shuttle::sync::Condvar::new())
        }
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let inner = guard.0.take().expect("only a wait takes the inner guard");
            guard.0 = Some(self.0.wait(inner).unwrap_or_else(|e| e.into_inner()));
        }
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

pub(super) use imp::*;
