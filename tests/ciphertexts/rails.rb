# Values as Active Record Encryption writes them (Debian's ruby-activerecord 7.2.2.2, Ruby 3.1): ruby rails.rb
require "logger"
require "active_record"
require "json"
Encryption = ActiveRecord::Encryption
made = []
%w[SHA1 SHA256].each do |digest|
  Encryption.configure(primary_key: "primary key", deterministic_key: "deterministic key", key_derivation_salt: "a-salt",
                       hash_digest_class: OpenSSL::Digest.const_get(digest), support_unencrypted_data: false)
  encryptor = Encryption::Encryptor.new
  providers = { "primary key" => Encryption::DerivedSecretKeyProvider.new("primary key"), "deterministic key" => Encryption::DeterministicKeyProvider.new("deterministic key") }
  ["s3cret", "", "grüße, 世界", "x" * 200].each do |text|
    providers.each do |key, provider|
      value = encryptor.encrypt(text, key_provider: provider, cipher_options: { deterministic: key == "deterministic key" })
      made << { format: "rails", key: "a-salt #{key}", plaintext: text, value: value }
    end
  end
  made << { format: "rails", key: "a-salt primary key", plaintext: "grüße", value: encryptor.encrypt("grüße".encode("ISO-8859-1"), key_provider: providers["primary key"]) }
end
puts JSON.pretty_generate(made)
