//! What a layer may ask of a target, without knowing its type.

/// A target's promise to yield a `P`. Each `P` is a type made for the purpose, never a bare number or text.
pub trait Param<P> {
    /// The value, cheap to obtain.
    fn param(&self) -> P;
}

/// Every cloneable value is its own parameter.
impl<P: Clone> Param<P> for P {
    fn param(&self) -> P {
        self.clone()
    }
}
