from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Keyset(_message.Message):
    __slots__ = ("primary_key_id", "key")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN_STATUS: _ClassVar[Keyset.Status]
        ENABLED: _ClassVar[Keyset.Status]
        DISABLED: _ClassVar[Keyset.Status]
        DESTROYED: _ClassVar[Keyset.Status]
    UNKNOWN_STATUS: Keyset.Status
    ENABLED: Keyset.Status
    DISABLED: Keyset.Status
    DESTROYED: Keyset.Status
    class OutputPrefix(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN_PREFIX: _ClassVar[Keyset.OutputPrefix]
        TINK: _ClassVar[Keyset.OutputPrefix]
        LEGACY: _ClassVar[Keyset.OutputPrefix]
        RAW: _ClassVar[Keyset.OutputPrefix]
        CRUNCHY: _ClassVar[Keyset.OutputPrefix]
    UNKNOWN_PREFIX: Keyset.OutputPrefix
    TINK: Keyset.OutputPrefix
    LEGACY: Keyset.OutputPrefix
    RAW: Keyset.OutputPrefix
    CRUNCHY: Keyset.OutputPrefix
    class Key(_message.Message):
        __slots__ = ("key_data", "status", "key_id", "output_prefix_type")
        KEY_DATA_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        KEY_ID_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_PREFIX_TYPE_FIELD_NUMBER: _ClassVar[int]
        key_data: KeyData
        status: Keyset.Status
        key_id: int
        output_prefix_type: Keyset.OutputPrefix
        def __init__(self, key_data: _Optional[_Union[KeyData, _Mapping]] = ..., status: _Optional[_Union[Keyset.Status, str]] = ..., key_id: _Optional[int] = ..., output_prefix_type: _Optional[_Union[Keyset.OutputPrefix, str]] = ...) -> None: ...
    PRIMARY_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    primary_key_id: int
    key: _containers.RepeatedCompositeFieldContainer[Keyset.Key]
    def __init__(self, primary_key_id: _Optional[int] = ..., key: _Optional[_Iterable[_Union[Keyset.Key, _Mapping]]] = ...) -> None: ...

class KeyData(_message.Message):
    __slots__ = ("type_url", "value", "key_material_type")
    class Material(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN_MATERIAL: _ClassVar[KeyData.Material]
        SYMMETRIC: _ClassVar[KeyData.Material]
        ASYMMETRIC_PRIVATE: _ClassVar[KeyData.Material]
        ASYMMETRIC_PUBLIC: _ClassVar[KeyData.Material]
        REMOTE: _ClassVar[KeyData.Material]
    UNKNOWN_MATERIAL: KeyData.Material
    SYMMETRIC: KeyData.Material
    ASYMMETRIC_PRIVATE: KeyData.Material
    ASYMMETRIC_PUBLIC: KeyData.Material
    REMOTE: KeyData.Material
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    KEY_MATERIAL_TYPE_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    value: bytes
    key_material_type: KeyData.Material
    def __init__(self, type_url: _Optional[str] = ..., value: _Optional[bytes] = ..., key_material_type: _Optional[_Union[KeyData.Material, str]] = ...) -> None: ...

class HpkeParams(_message.Message):
    __slots__ = ("kem", "kdf", "aead")
    class Kem(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KEM_UNKNOWN: _ClassVar[HpkeParams.Kem]
        DHKEM_X25519_HKDF_SHA256: _ClassVar[HpkeParams.Kem]
    KEM_UNKNOWN: HpkeParams.Kem
    DHKEM_X25519_HKDF_SHA256: HpkeParams.Kem
    class Kdf(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KDF_UNKNOWN: _ClassVar[HpkeParams.Kdf]
        HKDF_SHA256: _ClassVar[HpkeParams.Kdf]
    KDF_UNKNOWN: HpkeParams.Kdf
    HKDF_SHA256: HpkeParams.Kdf
    class Aead(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        AEAD_UNKNOWN: _ClassVar[HpkeParams.Aead]
        AES_128_GCM: _ClassVar[HpkeParams.Aead]
        AES_256_GCM: _ClassVar[HpkeParams.Aead]
        CHACHA20_POLY1305: _ClassVar[HpkeParams.Aead]
    AEAD_UNKNOWN: HpkeParams.Aead
    AES_128_GCM: HpkeParams.Aead
    AES_256_GCM: HpkeParams.Aead
    CHACHA20_POLY1305: HpkeParams.Aead
    KEM_FIELD_NUMBER: _ClassVar[int]
    KDF_FIELD_NUMBER: _ClassVar[int]
    AEAD_FIELD_NUMBER: _ClassVar[int]
    kem: HpkeParams.Kem
    kdf: HpkeParams.Kdf
    aead: HpkeParams.Aead
    def __init__(self, kem: _Optional[_Union[HpkeParams.Kem, str]] = ..., kdf: _Optional[_Union[HpkeParams.Kdf, str]] = ..., aead: _Optional[_Union[HpkeParams.Aead, str]] = ...) -> None: ...

class HpkePublicKey(_message.Message):
    __slots__ = ("version", "params", "public_key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    params: HpkeParams
    public_key: bytes
    def __init__(self, version: _Optional[int] = ..., params: _Optional[_Union[HpkeParams, _Mapping]] = ..., public_key: _Optional[bytes] = ...) -> None: ...

class HpkePrivateKey(_message.Message):
    __slots__ = ("version", "public_key", "private_key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    public_key: HpkePublicKey
    private_key: bytes
    def __init__(self, version: _Optional[int] = ..., public_key: _Optional[_Union[HpkePublicKey, _Mapping]] = ..., private_key: _Optional[bytes] = ...) -> None: ...
